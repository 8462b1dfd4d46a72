"""Swapping new weights into a running drafter."""
