"""The space-time diffusion transformer, and what changes it from one training stage to the next."""
