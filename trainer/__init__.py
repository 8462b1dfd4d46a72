"""Trains a drafter on traces and publishes better versions."""
