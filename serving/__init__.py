"""The engine and its HTTP layer."""
