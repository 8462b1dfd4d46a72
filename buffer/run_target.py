"""The target's weights that a run has now, for its trainer and for whoever starts it again.

A server whose target is replaced while it runs writes ``TARGET.json`` into the run folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from buffer.files import write_atomically
from buffer.small_json import read_small_json

NAME = "TARGET.json"
_SCHEMA = "slipstream.target/1"
_MOST_BYTES = 1 << 20
MOST_FORMER = 1000
"""Former weights that are remembered, the newest ones."""


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Weights of a run's target, and those before them."""

    fingerprint: str
    folder: str
    """Where they were read from."""
    former: tuple[str, ...]
    """Fingerprints of the weights before them, oldest first: drafters made for those may go on."""

    def followed_by(self, fingerprint: str, folder: str) -> RunTarget:
        """The target after another update."""
        before = [one for one in (*self.former, self.fingerprint) if one != fingerprint]
        return RunTarget(fingerprint, folder, tuple(before[-MOST_FORMER:]))

    def knows(self, fingerprint: str) -> bool:
        """Whether the run has, or had, these weights."""
        return fingerprint == self.fingerprint or fingerprint in self.former


def read_run_target(run_dir: Path) -> RunTarget | None:
    """What the run folder says; ``None``: its target was never replaced.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    path = run_dir / NAME
    try:
        body = read_small_json(path, _MOST_BYTES)
        if body["schema"] != _SCHEMA:
            raise ValueError(f"its schema is {body['schema']!r}")
        fingerprint, folder, former = body["fingerprint"], body["folder"], body["former"]
        if not all(isinstance(one, str) for one in (fingerprint, folder, *former)):
            raise ValueError("a value is no text")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Remove it if the run's target "
            f"is the one in the settings"
        ) from error
    return RunTarget(fingerprint, folder, tuple(former))


def write_run_target(run_dir: Path, target: RunTarget) -> None:
    """Replace what the run folder says.

    Raises:
        OSError: the disk is full or failed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    body = {"schema": _SCHEMA, **asdict(target)}
    write_atomically(run_dir / NAME, json.dumps(body, indent=1).encode())


def former_of(run_dir: Path, fingerprint: str) -> tuple[str, ...]:
    """Fingerprints of weights that the run's target had, if it has, or had, these; the given one is
    not among them. Nothing if the file cannot be read."""
    try:
        found = read_run_target(run_dir)
    except (OSError, ValueError):
        return ()
    if found is None or not found.knows(fingerprint):
        return ()
    return tuple(one for one in (*found.former, found.fingerprint) if one != fingerprint)
