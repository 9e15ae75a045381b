"""Metrics of generated clips: class accuracy by a trained classifier, motion direction, Fréchet and kernel distance."""
