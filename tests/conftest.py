"""What every test runs under: no network, one thread, and no GPU unless there is one."""

from __future__ import annotations

import json
import math
import os

# Before the first import of torch, transformers or triton, in this process and in its children.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from oracles.interpreter import spare_repetition

    spare_repetition()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def denormal_numbers_stay() -> Iterator[None]:
    """A server and a trainer flush them, for their whole process; that is no test's business."""
    yield
    torch.set_flush_denormal(False)


DURATIONS = Path(__file__).parent / "durations.json"
"""Seconds of the longest files; ``python -m tests.durations`` writes it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        longest_first(items)
    mark, reason = "gpu", "needs an NVIDIA GPU"
    if HAS_GPU:
        mark, reason = "interpreted", "interprets kernels, which is for machines without a GPU"
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def longest_first(items: list[pytest.Item]) -> None:
    """Sort files by their recorded times, so that no process begins a long one when the others
    are about to end; files without one, new or short, come first. The order within a file stays."""
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], math.inf))


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 target with its tokenizer, as `oracles.support.save_tiny_target` makes it."""
    from oracles.support import save_tiny_target

    return save_tiny_target(tmp_path_factory.mktemp("target"))
