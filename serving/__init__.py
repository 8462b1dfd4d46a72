"""The engine and its HTTP face."""
