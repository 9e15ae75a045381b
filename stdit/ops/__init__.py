"""CPU kernels applied to a model by one call."""
