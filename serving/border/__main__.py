"""``python -m serving.border``: an HTTP process, started by ``processes.HttpProcesses``."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run ``http_process`` in a process that cannot import torch.

    transformers imports it wherever it finds it. Tokenizers do without, and a second copy of torch
    would cost seconds and half a gigabyte.
    """
    # It cannot notice the end of the engine's process while it imports, and would hold the port
    # against the next server for as long.
    _on_death_of_parent(signal.SIGKILL)
    sys.modules["torch"] = None  # type: ignore[assignment]
    import typer

    from serving.border.http_process import main as serve

    _on_death_of_parent(0)  # from now on the socket says so, and there may be clients to be told
    typer.run(serve)


def _on_death_of_parent(number: int) -> None:
    """Which signal this process gets then; 0: none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


if __name__ == "__main__":
    main()
