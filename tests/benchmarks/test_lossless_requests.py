"""Random requests of the lossless benchmark for a GPU, at a tiny size: nothing differs, and planted
differences are detected."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import serving.engine.rounds
import serving.http.generation
from benchmarks.lossless import http, requests
from benchmarks.lossless.engines import Run
from oracles.random_bodies import TEXTS, question
from specops.lanes import Field

CPU = torch.device("cpu")
TINY = Run("tiny", "float64", "fast", 1.0)
BUNDLED = Run("bundled", "float64", "fast", 1.0)


def test_drafts_and_swaps_change_no_answer(monkeypatch):
    monkeypatch.setattr(requests, "SWAP_EVERY", 10)
    row = requests.row_of(TINY, CPU, 80)

    assert row["mismatches"] == 0, row["first_mismatches"]
    assert requests.is_sound([row])
    assert row["swaps"] > 3
    assert row["drafted"]["requests"] == row["requests"] == 80
    assert row["drafted"]["requests_drafted_for"] > 40
    assert 100 < row["drafted"]["accepted_tokens"] < row["drafted"]["drafted_tokens"]
    assert row["by_field"]["logprobs"]["requests"] > 5
    assert row["by_field"]["logprobs"]["drafted_tokens"] > 5


def blind_penalties(monkeypatch):
    """Bug: penalties do not count the drafted tokens before a position."""
    right = serving.engine.rounds.adjust_rows

    def wrong(logits, draft, asks, tables):
        for at in range(logits.shape[1]):
            right(logits[:, at : at + 1], draft[:, :0], asks, tables)

    monkeypatch.setattr(serving.engine.rounds, "adjust_rows", wrong)


def late_counts(monkeypatch):
    """Bug: only the last of the tokens that a round commits is counted for later penalties."""
    right = serving.engine.rounds.count_tokens

    def wrong(emitted, count, asks, tables):
        right(emitted, count.clamp(max=1), asks, tables)

    monkeypatch.setattr(serving.engine.rounds, "count_tokens", wrong)


def repeat_until_penalized(monkeypatch):
    """Only such requests: a random target that is asked greedily says the same token on and on,
    which the index finds."""
    right = requests.longer

    def longer(numbers, request):
        made = right(numbers, request)
        changed = replace(made.sampling, temperature=0.0, frequency_penalty=0.5, max_tokens=30)
        return replace(made, sampling=changed)

    monkeypatch.setattr(requests, "longer", longer)


def test_where_no_bug_of_penalties_is_planted_none_is_seen(monkeypatch):
    repeat_until_penalized(monkeypatch)

    assert requests.row_of(TINY, CPU, 20)["mismatches"] == 0


@pytest.mark.parametrize("plant", [blind_penalties, late_counts])
def test_a_bug_of_penalties_is_seen(monkeypatch, plant):
    """Plain decoding has it too, and does not show it."""
    repeat_until_penalized(monkeypatch)
    plant(monkeypatch)

    row = requests.row_of(TINY, CPU, 20)

    assert row["mismatches_by_part"]["token_ids"] > 0
    assert not requests.is_sound([row])
    assert row["first_mismatches"][0]["wanted"] != row["first_mismatches"][0]["got"]


def test_seeds_that_do_not_reproduce_are_seen(monkeypatch):
    """Bug: the numbers of a seeded request depend on how many rounds it had."""
    right = serving.engine.rounds.open_round

    def wrong(*args, **options):
        opened = right(*args, **options)
        return replace(opened, nonces_R=opened.ints_FR[Field.NONCE])

    monkeypatch.setattr(serving.engine.rounds, "open_round", wrong)
    row = requests.row_of(TINY, CPU, 80)

    assert row["mismatches_by_field"]["sampled"] > 0
    assert not requests.is_sound([row])


def test_a_field_that_was_never_drafted_for_is_told():
    drafted = {field: {"drafted_tokens": int(field != "stop")} for field in requests.USES}
    row = {"mismatches": 0, "by_field": drafted}

    assert requests.untried([row]) == ["stop"]
    assert not requests.is_sound([row])
    assert requests.is_sound([row, {**row, "by_field": {**drafted, "stop": {"drafted_tokens": 1}}}])


def bodies(count):
    numbers = random.Random(3)
    return [
        (path, question(numbers, "chat" in path, numbers.choice(TEXTS), vocab_size=4096))
        for _ in range(count)
        for path in http.PATHS
    ]


def test_bodies_are_answered_as_by_a_server_without_drafts():
    row = http.row_of(BUNDLED, CPU, bodies(6))

    assert row["mismatches"] == 0, row["first_mismatches"]
    assert row["choices"] > row["bodies"] == 12
    assert http.is_sound([row])


def test_usage_that_counts_drafts_is_seen(monkeypatch):
    right = serving.http.generation.Generation.usage

    def wrong(self):
        usage, drafted = right(self), self.speculation()
        counted = usage.completion_tokens + drafted.proposed - drafted.accepted
        return usage.model_copy(update={"completion_tokens": counted})

    monkeypatch.setattr(serving.http.generation.Generation, "usage", wrong)
    row = http.row_of(BUNDLED, CPU, bodies(2))

    assert row["mismatches"] > 0
    assert not http.is_sound([row])


@pytest.mark.gpu
def test_by_pinned_numerics_no_answer_differs(monkeypatch):
    monkeypatch.setattr(requests, "SWAP_EVERY", 10)
    pinned, cuda = Run("bundled", "bfloat16", "pinned", 1.0), torch.device("cuda")
    row = requests.row_of(pinned, cuda, 200)

    assert row["swaps"] > 0
    assert requests.is_sound([row]), row["first_mismatches"]
    assert http.is_sound([http.row_of(pinned, cuda, bodies(20))])
