"""CUDA MPS for a server and a trainer that share a GPU.

Without it, the kernels of two processes take turns: while an update runs, a step waits. Under MPS
they run side by side, and those of the trainer give way, see ``trainer.build``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_PATIENCE_S = 30.0


class MpsError(RuntimeError):
    """MPS cannot be used here; the text says why."""


@contextmanager
def mps(control: str = CONTROL) -> Iterator[None]:
    """Run an MPS daemon of this user's own. Processes that are started meanwhile use it; it ends
    with the block, after them.

    A daemon that ``CUDA_MPS_PIPE_DIRECTORY`` names already is used as it is.

    Args:
        control: name or path of NVIDIA's program.

    Raises:
        MpsError: the program is missing or fails.
    """
    if os.environ.get(PIPES):
        yield
        return
    found = shutil.which(control)
    if found is None:
        raise MpsError(f"{control} is not on PATH; it comes with NVIDIA's driver")
    # In /tmp: the path of a socket may have 107 bytes only.
    with tempfile.TemporaryDirectory(prefix="mps-") as name:
        own = {PIPES: str(Path(name, "pipes")), LOGS: str(Path(name, "logs"))}
        for folder in own.values():
            Path(folder).mkdir(mode=0o700)
        _tell(found, ["-d"], "", own)
        os.environ.update(own)
        try:
            yield
        finally:
            for variable in own:
                os.environ.pop(variable, None)
            _tell(found, [], "quit\n", own)


def _tell(control: str, arguments: list[str], text: str, variables: dict[str, str]) -> None:
    try:
        told = subprocess.run(
            [control, *arguments],
            input=text,
            text=True,
            capture_output=True,
            env={**os.environ, **variables},
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MpsError(f"{control} did not answer within {_PATIENCE_S:g} s") from None
    if told.returncode:
        said = (told.stderr or told.stdout).strip() or f"exit code {told.returncode}"
        raise MpsError(f"{control}: {said}")
