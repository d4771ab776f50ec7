"""Callbacks, logger and plugins of `shunted-lit fit`, and resuming of runs."""
