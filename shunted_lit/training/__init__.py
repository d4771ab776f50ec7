"""Lightning callbacks, loggers and plugins used by `shunted-lit fit`."""
