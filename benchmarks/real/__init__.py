"""Figures of a real target with a drafter trained for it."""
