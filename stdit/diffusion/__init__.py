"""Training objectives, timesteps, guidance and sampling. Knows no model: it meets them as callables."""
