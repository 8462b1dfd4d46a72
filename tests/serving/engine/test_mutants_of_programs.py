"""Bugs of ``test_mutants`` planted in rounds that are programs: M14 and M17. Those of the rule are
planted around the faces by ``oracles/device_bugs.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import serving.engine.rounds
from oracles.device_bugs import untempered
from oracles.engines import random_model, request_of, run
from oracles.random_requests import every_shape, exact_engine
from specops.draft_sampling import DraftLaw
from specops.lanes import Field


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=288).double()


# ---- M14 -----------------------------------------------------------------------------------------


def drawn_and_verified(model, monkeypatch):
    """What each draft token of a round was drawn from and under, and the law that verification got
    of them, by round."""
    drawn, pairs = [], []
    right_draw, right_rule = serving.engine.rounds.sample_draft, serving.engine.rounds.verify_logits

    def note_draw(logits, sampling, numbering, greedy, vocab):
        drawn.append((logits.clone(), sampling, greedy, vocab))
        return right_draw(logits, sampling, numbering, greedy, vocab)

    def note_rule(logits, sampling, draft, lens, rules, numbering, law):
        if law is not None:
            pairs.append((drawn[-draft.shape[1] :], law))
        return right_rule(logits, sampling, draft, lens, rules, numbering, law)

    monkeypatch.setattr(serving.engine.rounds, "sample_draft", note_draw)
    monkeypatch.setattr(serving.engine.rounds, "verify_logits", note_rule)
    engine = exact_engine(model, "echo", suffix=False)
    run(engine, [request_of(str(i), [i, 2], 20, temperature=0.7) for i in range(5)])
    assert len(pairs) > 5
    return pairs


def is_very_q(drawn, law):
    """Bit for bit, in the same precision, under the parameters that were drawn under."""
    logits = torch.stack([one[0] for one in drawn], dim=1)
    under = (law.sampling, law.greedy_R, law.vocab)
    is_same = all(a is b for one in drawn for a, b in zip(one[1:], under, strict=True))
    return is_same and law.logits_RKD.dtype == logits.dtype and law.logits_RKD.equal(logits)


def test_verification_gets_the_very_q_that_was_drawn_from(model, monkeypatch):
    pairs = drawn_and_verified(model, monkeypatch)

    assert all(is_very_q(drawn, law) for drawn, law in pairs)
    assert all(law.sampling.truncates for _, law in pairs)  # as ``device_law`` samples


def rounded(logits, *rest):
    return DraftLaw(logits.bfloat16().to(logits.dtype), *rest)


def of_another_shape(logits, sampling, *rest):
    return DraftLaw(logits, untempered(sampling), *rest)


@pytest.mark.parametrize("bug", [rounded, of_another_shape])
def test_another_q_is_seen(model, monkeypatch, bug):
    monkeypatch.setattr(serving.engine.rounds, "DraftLaw", bug)

    assert not any(is_very_q(*pair) for pair in drawn_and_verified(model, monkeypatch))


# ---- M17 -----------------------------------------------------------------------------------------


def answers(model, **options):
    """To seeded and greedy requests."""
    got = run(exact_engine(model, "echo", **options), list(every_shape()))
    return {name: collected.token_ids for name, collected in got.items()}


def opened_with(change, monkeypatch):
    right = serving.engine.rounds.open_round

    def wrong(*arguments, **options):
        return change(right(*arguments, **options))

    monkeypatch.setattr(serving.engine.rounds, "open_round", wrong)


def test_numbers_that_move_with_the_rounds_are_seen(model, monkeypatch):
    """A round that starts elsewhere has other numbers: answers with and without drafts differ."""

    def by_round(opened):
        return replace(opened, nonces_R=opened.ints_FR[Field.NONCE] + 1)

    assert answers(model, max_draft=8) == answers(model, max_draft=0)
    opened_with(by_round, monkeypatch)
    assert answers(model, max_draft=8) != answers(model, max_draft=0)


def test_rows_that_share_a_number_are_seen(model, monkeypatch):
    def one_key(opened):
        ints = opened.ints_FR.clone()
        ints[Field.KEY] = ints[Field.KEY, 0]
        return replace(opened, ints_FR=ints)

    alone = answers(model, max_batch=1)
    assert answers(model, max_batch=8) == alone
    opened_with(one_key, monkeypatch)
    assert answers(model, max_batch=1) == alone
    assert answers(model, max_batch=8) != alone
