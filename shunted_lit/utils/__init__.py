"""Helpers without a topic of their own: files, seeds, distributed runs."""
