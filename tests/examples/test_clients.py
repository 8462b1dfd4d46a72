"""The demo's clients against a real server process on a tiny random target."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from examples.arms import ALL_ARMS, ArmsError, setups
from examples.clients import Replayer, Reply, Sampling, Server, Traffic, replay_rounds
from examples.demo import begin_server, version_changes, wait_for_server
from examples.plan import DemoSettings
from examples.processes import Child, stop
from examples.report import mismatched_outputs
from examples.traffic.prompts import Message, Prompt

PROMPTS = [Prompt(prompt=f"def add_{i}(left, right):\n    return left") for i in range(6)]
MAX_TOKENS = 12
SAMPLING = Sampling(0.7, MAX_TOKENS)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def server(tiny_target_dir: Path, run_dir: Path) -> Iterator[Server]:
    own = (f"target={tiny_target_dir}", "drafter.path=null", "engine.max_model_len=512")
    settings = DemoSettings(run_dir=run_dir, overrides=own)
    children: list[Child] = []
    try:
        children.append(begin_server(settings))
        yield wait_for_server(settings, children)
    finally:
        stop(children)


def test_every_prompt_is_answered_once(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(server, PROMPTS, 3, SAMPLING, lambda _, reply: replies.append(reply))

    traffic.start()
    traffic.wait()

    assert traffic.failures == []
    assert len(replies) == len(PROMPTS)
    assert all(0 < len(reply.token_ids) <= MAX_TOKENS for reply in replies)


def test_stopped_traffic_finishes_requests_in_flight_and_sends_no_more(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(server, PROMPTS * 50, 2, SAMPLING, lambda _, reply: replies.append(reply))

    traffic.start()
    traffic.stop()

    assert traffic.is_over()
    assert traffic.failures == []
    assert len(replies) < len(PROMPTS) * 50


def test_refused_request_is_counted_and_the_others_go_on(server: Server):
    replies: list[Reply] = []
    traffic = Traffic(
        server,
        [Prompt(prompt="x" * 5000), *PROMPTS],
        1,
        SAMPLING,
        lambda _, reply: replies.append(reply),
    )

    traffic.start()
    traffic.wait()

    assert len(replies) == len(PROMPTS)
    [failure] = traffic.failures
    assert "max_model_len" in failure


def test_an_answer_repeats_with_its_seed_and_only_with_it(server: Server):
    first, again = (server.ask(PROMPTS[0], SAMPLING) for _ in range(2))
    other = server.ask(PROMPTS[0], replace(SAMPLING, seed=1))

    assert first.token_ids == again.token_ids != other.token_ids


def test_a_chat_is_answered_as_one_and_a_prompt_may_say_how(server: Server):
    messages = (Message(role="user", content="hello"),)
    short = Prompt(messages=messages, max_tokens=3, temperature=0)

    assert len(server.ask(short, SAMPLING).token_ids) == 3
    greedy = [server.ask(short, replace(SAMPLING, seed=seed)).token_ids for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_arms_name_the_drafter_that_a_server_lacks(server: Server):
    drafters = [d for d in server.drafter()["drafters"] if not d["on_request"]]

    with pytest.raises(ArmsError, match=r"looks up the request alone.*--config compare"):
        setups(drafters, 0, 1)


def test_all_arms_give_the_same_tokens_whatever_the_version(server: Server, run_dir: Path):
    weights = FolderWeights(run_dir / "weights")
    first = weights.read(0)
    weights.publish(replace(first.manifest, version=1, parent=0), {TENSORS: first.files[TENSORS]})
    began_unix_s = time.time()
    arms = setups(server.drafter()["drafters"], static=0, newest=1)
    replayer = Replayer(server, arms, SAMPLING, num_clients=2, num_warmup=1)

    replays = [
        replay
        for turns in replay_rounds(len(PROMPTS), block=3)
        for turn in turns
        for replay in replayer.take("c", turn, PROMPTS, warmup=PROMPTS[:1])
    ]

    assert replayer.failures == []
    assert len(replays) == 6 * len(PROMPTS)
    assert mismatched_outputs(replays) == 0
    versions = {arm: {r.version for r in replays if r.arm == arm} for arm in ALL_ARMS[1:]}
    assert versions == {arm: {arms[arm].version} for arm in ALL_ARMS[1:]}
    assert all(r.acceptance.num_proposed == 0 for r in replays if r.arm == "plain")
    for share_s in {r.share_s for r in replays}:  # that of each turn
        turn = [r for r in replays if r.share_s == share_s]
        assert share_s * len(turn) >= max(r.request_s for r in turn) > 0
    assert replayer.num_warmed == 5, "each arm that drafts, once"
    assert server.swap(None)["pinned"] is None
    swaps = version_changes(server.drafter()["history"], began_unix_s)
    assert {change.version for change in swaps} == {0, 1}
    assert all(change.at_s > 0 and not change.rolled_back for change in swaps)


def test_every_arm_is_planned_for_by_a_policy_of_its_own(server: Server):
    """The test before this one has run all arms."""
    arms = server.policy()["arms"]

    assert {name.rpartition(" ")[2] for name in arms} == {"0", "1"}
    assert len(arms) == 5
