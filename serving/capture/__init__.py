"""Capture of what served requests teach the trainer."""
