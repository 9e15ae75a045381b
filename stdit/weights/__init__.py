"""Weights from and to published layouts (convert, layouts/), and from one stage to the next (transfer)."""
