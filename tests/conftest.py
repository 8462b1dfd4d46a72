"""What every test runs under: no network, one thread, and no GPU unless there is one."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import threading

# Before the first import of torch, transformers or triton, in this process and in its children.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# Until all tests are collected: the collector would traverse the objects of torch, transformers and
# our tests dozens of times, which takes a quarter of the time.
gc.disable()

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from oracles.interpreter import spare_repetition

    spare_repetition()
torch.set_num_threads(1)


class Hidden:
    """What exists when all tests are collected is hidden from the garbage collector. It lives as
    long as this process, and a full collection takes half a second to traverse it, 800,000 objects.

    A service hides all that exists and shows it again when it ends, so each test of one would end
    with such a collection. Here both do nothing, but for the tests that are about them."""

    def __init__(self) -> None:
        self.is_shown = False
        """The test is about the collector."""
        self.has_ended = False
        """A service has ended since the last collection."""
        self._freeze, self._unfreeze = gc.freeze, gc.unfreeze

    def hide(self) -> None:
        self._freeze()

    def freeze(self) -> None:
        """In the place of ``gc.freeze``."""
        if self.is_shown:
            self._freeze()

    def unfreeze(self) -> None:
        """In the place of ``gc.unfreeze``."""
        self.has_ended = True
        if self.is_shown:
            self._unfreeze()


_hidden = Hidden()
gc.freeze, gc.unfreeze = _hidden.freeze, _hidden.unfreeze


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    _hidden.hide()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if _hidden.has_ended:
        gc.collect()
        _hidden.has_ended = False
    if _hidden.is_shown:
        _hidden.is_shown = False
        _hidden.hide()


@pytest.fixture
def real_collector() -> None:
    """For tests of what is hidden from the garbage collector."""
    _hidden.is_shown = True


@pytest.fixture(autouse=True)
def denormal_numbers_stay() -> Iterator[None]:
    """A server and a trainer flush them, for their whole process; that is no test's business."""
    yield
    torch.set_flush_denormal(False)


_KAFKA_THREAD = "kafka"
_CLOSED_S = 5.0


_HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


@pytest.fixture(autouse=True)
def kafka_clients_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """A client of Kafka is a thread that draws random numbers and logs. One that a test leaves
    behind disturbs others, so the test that opened it fails. A test that has failed anyway may: its
    traceback holds what it opened."""
    before = _kafka_threads()
    yield
    left = _kafka_threads() - before
    if left and not request.node.stash.get(_HAS_FAILED, False):
        # Closed with their owner, which may be what a fixture has made, or part of a cycle.
        request.node.funcargs.clear()
        gc.collect()
        for thread in left:
            thread.join(_CLOSED_S)
        alive = sorted(thread.name for thread in left if thread.is_alive())
        assert not alive, f"clients of Kafka that this test opened still run: {alive}; close them"


def _kafka_threads() -> set[threading.Thread]:
    if "kafka" not in sys.modules:
        return set()
    return {one for one in threading.enumerate() if one.name.startswith(_KAFKA_THREAD)}


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
