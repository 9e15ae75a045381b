"""Autoencoders (video.py) and text encoders (text.py: one, in single.py, or several), each with an identity that says
what it is and rebuilds it."""
