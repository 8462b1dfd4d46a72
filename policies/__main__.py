"""``python -m policies``: the same as the command ``policies``."""

from policies.cli import app

app(prog_name="policies")
