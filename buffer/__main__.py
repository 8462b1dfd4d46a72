"""``python -m buffer``: the same as the command ``buffer``."""

from buffer.cli import app

app(prog_name="buffer")
