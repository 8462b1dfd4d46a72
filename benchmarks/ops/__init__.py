"""One file per kernel of ``specops``: its cost against its floor and the best alternatives."""
