"""The models whose output distribution is preserved."""
