"""A real server and a real trainer, each a process: a network fitted to the traffic comes with a
version, is swapped in, and decides, while answers stay the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from oracles.forked import Forked
from oracles.support import REPOSITORY
from tests.serving.http.live import LiveServer, environment, running_server, wait_for
from tests.trainer.test_fits import network
from trainer.fitted_policy import policy_path

MAX_DRAFT = 8
TARGET, DRAFTER = REPOSITORY / "examples/target", REPOSITORY / "examples/drafter/0"
COMMON = ("drafter.kind=eagle3", f"drafter.path={DRAFTER}", f"drafter.max_draft={MAX_DRAFT}")
SERVER = (
    *COMMON,
    "drafter.suffix.enabled=false",
    "policy.guard=false",
    "policy.random_share=0.3",
    "swap.poll_s=0.1",
)
TRAINER = (
    *COMMON,
    "device=cpu",
    "trainer.device=cpu",
    "trainer.cpu_threads=1",
    "trainer.learn=on_drift",
    "trainer.min_traces=100000",
    "trainer.policy.kind=ltd",
    "trainer.policy.least_steps=512",
    "trainer.policy.held_out=0.5",
    "trainer.policy.every_s=1",
    "trainer.policy.wait_s=0",
)
PROMPTS = ("def add(", "The sum of two numbers is", "Once upon a time", "import os\n")
ASK = {"prompt": "def add(", "max_tokens": 24, "temperature": 0, "seed": 1}


@pytest.fixture
def started() -> Iterator[list[Forked]]:
    """Trainers that a test has started; none outlives it."""
    found: list[Forked] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


def start_trainer(run_dir: Path, log: Path) -> Forked:
    sets = [f"target={TARGET}", f"run_dir={run_dir}", *TRAINER]
    command = [part for one in sets for part in ("--set", one)]
    return Forked(["-m", "trainer", "launch", *command], environment(), REPOSITORY, log)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / "trainer" / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [one for one in map(json.loads, lines) if one["event"] == name]


def serve(server: LiveServer, until: Any) -> None:
    """Sampled requests, one after the other, until something is there."""

    def ask(number: int) -> None:
        body = {
            "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 48, "temperature": 0.7,
            "seed": number, "ignore_eos": True,
        }  # fmt: skip
        with server.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 200

    for number in range(4000):
        ask(number)
        if until():
            return
    raise AssertionError("served 4000 requests in vain")


@pytest.mark.timeout(600)
def test_a_fitted_network_is_swapped_in_and_decides(tmp_path: Path, started: list[Forked]) -> None:
    run_dir = tmp_path / "run"
    # The policy in force drafts as many tokens as it may, whatever they bring.
    policy_path(run_dir).parent.mkdir(parents=True)
    policy_path(run_dir).write_bytes(network(MAX_DRAFT, max_draft=MAX_DRAFT))
    with running_server(TARGET, tmp_path, *SERVER, "policy.kind=ltd") as server:
        with server.client() as client:
            before = client.post("/v1/completions", json=ASK).json()["choices"]
        started.append(start_trainer(run_dir, tmp_path / "trainer.txt"))
        wait_for(lambda: server.metric("drafter_version") == 1, 120)
        serve(server, lambda: events(run_dir, "policy_gate"))
        [gate] = events(run_dir, "policy_gate")[:1]
        assert gate["passed"] and gate["newest"] == 1, gate["text"]
        wait_for(lambda: server.metric("drafter_version") >= 2, 60)
        with server.client() as client:
            status = client.get("/admin/drafter").json()
            after = client.post("/v1/completions", json=ASK).json()["choices"]
        serve(server, lambda: True)
        with server.client() as client:
            policy = client.get("/dashboard/data").json()["policy"]
        assert policy["kind"] == "ltd" and policy["has_weights"]
        assert (policy["fitted_to_version"], policy["versions_since"]) == (1, 1)
        assert started[0].poll() is None
        assert server.stop() == 0

    store = FolderWeights(run_dir / "weights")
    manifests = [store.read_manifest(version) for version in (0, 1, 2)]
    assert len({one.files[TENSORS].sha256 for one in manifests}) == 1
    assert manifests[2].policy["ltd"] != manifests[1].policy["ltd"]
    assert after == before
    assert status["state"] == "steady" and status["ignored_calibrations"] == 0, status
    assert status["swaps"]["rolled_back"] == 0
    assert not any("trial" in one["event"] for one in status["history"])
