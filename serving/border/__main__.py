"""``python -m serving.border``: an HTTP process, started by ``processes.HttpProcesses``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``http_process`` in a process that cannot import torch.

    transformers imports it wherever it finds it. Tokenizers do without, and a second copy of torch
    would cost seconds and half a gigabyte.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    import typer

    from serving.border.http_process import main as serve

    typer.run(serve)


if __name__ == "__main__":
    main()
