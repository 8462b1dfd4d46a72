"""One target and its traffic, shared by all trainer tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from buffer.records import Trace
from tests.trainer.traffic import fingerprint_of, make_traces, save_target


@dataclass(frozen=True)
class World:
    """A target on disk and the traces it generated."""

    target: Path
    model: Any
    fingerprint: str
    traces: list[Trace]
    """Greedy and sampled requests, mixed."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    target = tmp_path_factory.mktemp("target")
    model = save_target(target)
    fingerprint = fingerprint_of(target)
    greedy = make_traces(model, fingerprint, 48)
    sampled = make_traces(model, fingerprint, 24, first_seq=48, temperature=0.7)
    return World(target, model, fingerprint, [*greedy, *sampled])
