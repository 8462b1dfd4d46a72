"""Captures training data from served requests."""
