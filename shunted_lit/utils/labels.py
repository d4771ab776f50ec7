"""Conventions of labels that data, tasks and pictures share."""

IGNORED = 255  # in a label map: no class, neither trained on nor counted
