"""The suffix index: proposes what followed the last few tokens when they occurred before."""
