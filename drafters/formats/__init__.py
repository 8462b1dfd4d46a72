"""Drafters as others publish them: their layouts read into bundles, and bundles written in them."""
