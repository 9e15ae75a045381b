"""stdit: train and run spatial-temporal diffusion transformers for text-to-image and text-to-video."""

__version__ = "0.1.0"
