"""``python -m drafters``: the same as the command ``drafters``."""

from drafters.cli import app

app(prog_name="drafters")
