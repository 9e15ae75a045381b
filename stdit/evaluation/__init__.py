"""How good generated clips are: a classifier that reads them, the path they travel, a Fréchet distance."""
