"""Pictures: predictions, the curves of a run, and attention."""
