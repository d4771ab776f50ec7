"""Figures: predictions, training curves, attention."""
