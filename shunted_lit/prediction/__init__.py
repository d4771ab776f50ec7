"""Writers of predictions, and the chunks in which a prediction run is resumed."""
