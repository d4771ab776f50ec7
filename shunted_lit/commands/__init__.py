"""One module per command of `shunted-lit`."""
