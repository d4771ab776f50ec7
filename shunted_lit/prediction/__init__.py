"""Prediction: writers of its files, and the chunks in which an interrupted run is resumed."""
