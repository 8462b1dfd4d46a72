"""The demo's clients against a real server process on a tiny random target."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from examples.demo import DemoSettings, begin_server, version_changes, wait_for_server
from examples.processes import Child, stop
from examples.report import mismatched_outputs
from examples.traffic import Replayer, Reply, Server, Traffic, replay_rounds

PROMPTS = [f"def add_{i}(left, right):\n    return left" for i in range(6)]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def server(tiny_target_dir: Path, run_dir: Path) -> Iterator[Server]:
    settings = DemoSettings(
        run_dir=run_dir, overrides=(f"target={tiny_target_dir}", "drafter.path=null")
    )
    children: list[Child] = []
    try:
        children.append(begin_server(settings))
        yield wait_for_server(settings, children[0])
    finally:
        stop(children)


def test_every_prompt_is_answered_once(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(server, PROMPTS, 3, MAX_TOKENS, replies.append)

    traffic.start()
    traffic.wait()

    assert traffic.failures == []
    assert len(replies) == len(PROMPTS)
    assert all(0 < len(reply.token_ids) <= MAX_TOKENS for reply in replies)


def test_stopped_traffic_finishes_requests_in_flight_and_sends_no_more(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(server, PROMPTS * 50, 2, MAX_TOKENS, replies.append)

    traffic.start()
    traffic.stop()

    assert traffic.is_over()
    assert traffic.failures == []
    assert len(replies) < len(PROMPTS) * 50


def test_refused_request_is_counted_and_the_others_go_on(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(server, ["x" * 5000, *PROMPTS], 1, MAX_TOKENS, replies.append)

    traffic.start()
    traffic.wait()

    assert len(replies) == len(PROMPTS)
    [failure] = traffic.failures
    assert "max_model_len" in failure


def test_three_arms_give_the_same_tokens_whatever_the_version(server: Server, run_dir: Path):
    weights = FolderWeights(run_dir / "weights")
    first = weights.read(0)
    weights.publish(replace(first.manifest, version=1, parent=0), {TENSORS: first.files[TENSORS]})
    began_unix_s = time.time()
    replayer = Replayer(server, {"static": 0, "tuned": 1}, MAX_TOKENS, num_warmup=1)

    replays = [
        replay
        for turns in replay_rounds(len(PROMPTS), block=3)
        for turn in turns
        for replay in replayer.take("c", turn, PROMPTS, warmup=PROMPTS[:1])
    ]

    assert replayer.failures == []
    assert len(replays) == 3 * len(PROMPTS)
    assert mismatched_outputs(replays) == 0
    assert {(r.arm, r.version) for r in replays if r.arm != "plain"} == {
        ("static", 0),
        ("tuned", 1),
    }
    assert all(r.acceptance.num_proposed == 0 for r in replays if r.arm == "plain")
    assert replayer.num_warmed == 4
    assert server.swap(None)["pinned"] is None
    swaps = version_changes(server.drafter()["history"], began_unix_s)
    assert {change.version for change in swaps} == {0, 1}
    assert all(change.at_s > 0 and not change.rolled_back for change in swaps)
