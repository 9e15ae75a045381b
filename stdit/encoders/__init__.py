"""Autoencoders (video.py) and text encoders (text.py), each with an identity that says what it is and rebuilds it."""
