"""What the model is asked to predict, at which times, and how samples are drawn from it."""
