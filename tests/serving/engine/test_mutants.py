"""Bugs that engines have shipped, planted here one by one: each must be seen.

A test that has never failed proves nothing, so for every entry the check that guards us is run over
code with the bug in it. Sources and figures of the real cases: issues of vLLM, SGLang,
transformers, EAGLE and others.

| mutant | bug | test that kills it |
|---|---|---|
| M1 | draft number reused for the residual | ``rule-m1`` here |
| M2 | acceptance number reused for the residual | ``rule-m2`` here; ``test_sampled_law`` |
| M3 | every draft kept | ``rule-m3`` here |
| M4 | greedy draft, soft q | ``rule-m4`` here |
| M5 | drawn from the shaped q, whole q handed over | ``rule-m5`` here |
| M6 | after a rejection drawn from p | ``rule-m6`` here; ``test_sampled_law``; by enumeration in \
``test_verification_is_exact`` |
| M7 | after a rejection only the rejected token is left out | ``rule-m7`` here |
| M8 | bonus from the position before | ``rule-m8`` here |
| M9 | bonus without temperature, top-k, top-p | ``rule-m9`` here |
| M10 | bias, a penalty or a truncation forgotten in verification, or penalties blind to the draft \
| ``test_a_shape_that_verification_forgets_is_seen``, \
``test_penalties_that_do_not_see_the_draft_are_seen`` |
| M11 | greedy verification of sampled requests | ``rule-m11`` here |
| M12 | block acceptance, residual of the standard rule | ``test_verification_is_exact`` |
| M13 | 24-bit numbers | ``test_joint_law`` |
| M14 | q of lower precision than what was drawn from | ``test_a_rounded_q_is_seen``; of programs \
in ``test_mutants_of_programs``, as M17 |
| M15 | verification off by one | ``rule-m15`` here |
| M16 | acceptance of p / 0.9 | ``rule-m16`` here |
| M17 | rows share a number; rounds move a seeded request's numbers | \
``test_rows_that_share_a_number_are_seen``, ``test_numbers_that_move_with_the_rounds_are_seen``, \
``test_requests_without_a_seed_are_answered_independently`` |
| M18 | parameters of another row, only in batches above 2 and above temperature 0 | \
``test_a_row_with_the_shape_of_another_is_seen`` |
| M19 | q of other weights than those that drafted | ``rule-m19`` here; ``test_sampled_law`` |
| M20 | kept if p > 0.3 | ``rule-m20`` here |
| M21 | bonus from the drafter | ``rule-m21`` here |
| M22 | drafts and grammars | does not apply: there are no grammars |

M3 to M6, M8, M9, M11, M15, M17 and M19 are planted around the kernels too
(``oracles/device_bugs.py``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import drafters.eagle3.paged
import serving.engine.packing
import serving.engine.verifying
from oracles.engines import random_model, request_of, run
from oracles.joint_law import (
    Cut,
    Parts,
    Seen,
    Setting,
    chi_squared_excess,
    expected_law,
    sample,
    tables_of,
)
from oracles.plain_reference import decode
from oracles.random_requests import every_shape, exact_engine, twice
from specops.penalties import adjust_logits
from specops.sampling import draw
from specops.verify import Verdict, verify_match

# ---- in the rule: seen by the joint law of 100,000 samples ---------------------------------------

SETTING = Setting(temperature=1.5, cut=Cut.NOTHING, num_draft=2)
"""Three tokens are looked at, so that the bonus after two drafted ones is among them."""
NUM_SAMPLES = 100_000


def last_place(seen: Seen, rule: str):
    """Rows, and the place of the number that decided last."""
    kept = seen.verdict(rule).num_accepted_R
    return torch.arange(len(kept)), kept.clamp(max=seen.draft.shape[1] - 1)


def with_next(seen: Seen, rule: str, law_RV, everywhere=True):
    """The right verdict, but the next token is drawn from ``law`` (or only the bonus is)."""
    right = seen.verdict(rule)
    wrong = draw(law_RV, seen.next_u)
    is_wrong = everywhere | (right.num_accepted_R == seen.lens)
    following = torch.where(is_wrong, wrong, right.next_R)
    return Verdict(right.num_accepted_R, following, None, right.draft_p_RK)


def m1(seen, rule):
    return replace(seen, next_u=seen.draft_u[last_place(seen, rule)]).verdict(rule)


def m2(seen, rule):
    return replace(seen, next_u=seen.accept_u[last_place(seen, rule)]).verdict(rule)


def m3(seen, rule):
    return replace(seen, accept_u=torch.zeros_like(seen.accept_u)).verdict(rule)


def m6(seen, rule):
    kept = seen.verdict(rule).num_accepted_R
    return with_next(seen, rule, seen.p[torch.arange(len(kept)), kept])


def m7(seen, rule):
    at = last_place(seen, rule)
    kept = seen.verdict(rule).num_accepted_R
    p = seen.p[at[0], kept]
    without = p.scatter(1, seen.draft[at][:, None], 0.0)
    return with_next(seen, rule, torch.where((kept == seen.lens)[:, None], p, without))


def m8(seen, rule):
    kept = seen.verdict(rule).num_accepted_R
    before = seen.p[torch.arange(len(kept)), (kept - 1).clamp(min=0)]
    return with_next(seen, rule, before, everywhere=False)


def m9(seen, rule):
    return with_next(seen, rule, seen.p_raw[:, -1], everywhere=False)


def m11(seen, rule):
    return Verdict(*verify_match(seen.p.argmax(-1), seen.draft, seen.lens), None, seen.p)


def m15(seen, rule):
    late = torch.cat((seen.p[:, 1:], seen.p[:, -1:]), dim=1)
    return replace(seen, p=late).verdict(rule)


def m16(seen, rule):
    return replace(seen, accept_u=0.9 * seen.accept_u).verdict(rule)


def m20(seen, rule):
    is_sure = seen.p[:, :-1].gather(-1, seen.draft[..., None])[..., 0] > 0.3
    return replace(seen, accept_u=torch.where(is_sure, 0.0, seen.accept_u)).verdict(rule)


def m21(seen, rule):
    return with_next(seen, rule, seen.q_after, everywhere=False)


MUTANTS = {
    **{f.__name__: Parts(verify=f) for f in (m1, m2, m3, m6, m7, m8, m9, m11, m15, m16, m20, m21)},
    "m4": Parts(draw_draft=lambda q, u: q.argmax(-1)),
    "m5": Parts(hand_over=lambda drawn, raw: raw),
    "m19": Parts(hand_over=lambda drawn, raw: drawn.roll(1, dims=-1)),
}


def excess(parts, rule, regime):
    tables = tables_of(regime)
    counts, _ = sample(SETTING, tables, rule, NUM_SAMPLES, parts)
    return chi_squared_excess(counts, expected_law(SETTING, tables))


@pytest.mark.parametrize("rule", ["block", "standard"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_in_the_rule_is_seen_with_one_drafter_or_the_other(name, rule):
    """Some bugs need two: M20, under the standard rule, is invisible with an opposed drafter."""
    assert any(excess(MUTANTS[name], rule, regime) > 1 for regime in ("close", "opposed"))


@pytest.mark.parametrize("rule", ["block", "standard"])
@pytest.mark.parametrize("regime", ["close", "opposed"])
def test_where_nothing_is_planted_nothing_is_seen(rule, regime):
    assert excess(Parts(), rule, regime) < 1


# ---- in how serving calls it: seen by answers that must equal the book's -------------------------

V = 288


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=V).double()


@pytest.fixture(scope="module")
def by_the_book(model):
    return {r.id: decode(model, r) for r in every_shape()}


def wrong_answers(model, by_the_book, max_batch=8, max_draft=8):
    """Ways of shaping that are answered otherwise than by the book."""
    engine = exact_engine(model, "echo", max_batch=max_batch, max_draft=max_draft)
    got = run(engine, twice(every_shape()))
    return {
        name for name, c in got.items() if c.token_ids != by_the_book[name.removesuffix(" again")]
    }


def forget(**neutral):
    """``adjustments_of`` with some fields at their neutral value."""
    right = serving.engine.packing.adjustments_of

    def adjustments(batch, device):
        found = right(batch, device)
        if found is None:
            return None
        values = {name: torch.full_like(getattr(found, name), v) for name, v in neutral.items()}
        return replace(found, **values)

    return "adjustments_of", adjustments


def shape_without(**neutral):
    """``sampling_of`` with some fields at their neutral value."""
    right = serving.engine.packing.sampling_of

    def sampling(batch, vocab_size, device):
        rows = right(batch, vocab_size, device)
        values = {name: torch.full_like(getattr(rows, name), v) for name, v in neutral.items()}
        return replace(rows, **values)

    return "sampling_of", sampling


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(forget(presence_A=0), id="presence_penalty"),
        pytest.param(forget(frequency_A=0), id="frequency_penalty"),
        pytest.param(forget(repetition_A=1), id="repetition_penalty"),
        pytest.param(forget(bias_T=0), id="logit_bias"),
        pytest.param(shape_without(temperature_R=1), id="temperature"),
        pytest.param(shape_without(top_k_R=V), id="top_k"),
        pytest.param(shape_without(top_p_R=1), id="top_p"),
        pytest.param(shape_without(min_p_R=0), id="min_p"),
    ],
)
def test_a_shape_that_verification_forgets_is_seen(model, by_the_book, monkeypatch, mutant):
    monkeypatch.setattr(serving.engine.verifying, *mutant)

    assert wrong_answers(model, by_the_book)


def blind_to_the_draft(logits, draft, adjustments):
    every = [
        adjust_logits(logits[:, j : j + 1], draft[:, :0], adjustments)
        for j in range(logits.shape[1])
    ]
    return torch.cat(every, dim=1)


def one_draft_late(logits, draft, adjustments):
    return adjust_logits(logits, draft.roll(1, dims=1), adjustments)


@pytest.mark.parametrize("mutant", [blind_to_the_draft, one_draft_late])
def test_penalties_that_do_not_see_the_draft_are_seen(model, by_the_book, monkeypatch, mutant):
    """Only where something was drafted: plain decoding has the bug too, and does not show it."""
    monkeypatch.setattr(serving.engine.verifying, "adjust_logits", mutant)

    assert wrong_answers(model, by_the_book)
    assert not wrong_answers(model, by_the_book, max_draft=0)


RIGHT_UNIFORMS = serving.engine.packing.uniforms


def one_key(keys, positions, nonces, stream):
    return RIGHT_UNIFORMS(np.full_like(keys, keys[0]), positions, nonces, stream)


def test_rows_that_share_a_number_are_seen(model, by_the_book, monkeypatch):
    monkeypatch.setattr(serving.engine.packing, "uniforms", one_key)

    assert wrong_answers(model, by_the_book, max_batch=8)
    assert not wrong_answers(model, by_the_book, max_batch=1)


def test_numbers_that_move_with_the_rounds_are_seen(model, by_the_book, monkeypatch):
    """A round that starts elsewhere has other numbers: answers with and without drafts differ."""

    def by_round(keys, positions, nonces, stream):
        return RIGHT_UNIFORMS(keys, positions, positions[:, 0], stream)

    def tokens(max_draft):
        engine = exact_engine(model, "echo", max_draft=max_draft)
        got = run(engine, twice(every_shape()))
        return {name: collected.token_ids for name, collected in got.items()}

    assert tokens(max_draft=8) == tokens(max_draft=0)
    monkeypatch.setattr(serving.engine.packing, "uniforms", by_round)
    assert tokens(max_draft=8) != tokens(max_draft=0)


def num_distinct(model):
    """Different answers to 32 equal requests without a seed."""
    engine = exact_engine(model, "echo", max_batch=32)
    got = run(engine, [request_of(str(i), [1, 2], 8, temperature=1.5) for i in range(32)])
    return len({tuple(collected.token_ids) for collected in got.values()})


def test_requests_without_a_seed_are_answered_independently(model, monkeypatch):
    assert num_distinct(model) == 32
    monkeypatch.setattr(serving.engine.packing, "uniforms", one_key)
    assert num_distinct(model) < 8


def test_a_row_with_the_shape_of_another_is_seen(model, by_the_book, monkeypatch):
    right = serving.engine.packing.sampling_of

    def mixed_up(batch, vocab_size, device):
        rows = batch if len(batch) <= 2 else [*batch[1:], batch[0]]
        return right(rows, vocab_size, device)

    monkeypatch.setattr(serving.engine.verifying, "sampling_of", mixed_up)

    assert not wrong_answers(model, by_the_book, max_batch=2)
    assert wrong_answers(model, by_the_book, max_batch=8)


# ---- M14 -----------------------------------------------------------------------------------------


def drawn_and_verified(model, monkeypatch):
    """Pairs of q as the drafter drew from it and as the rule got it, one for each round."""
    drawn, pairs = [], []
    right_draw, right_rule = drafters.eagle3.paged.draw, serving.engine.verifying.verify_block

    def note_draw(law, numbers):
        drawn.append(law)
        return right_draw(law, numbers)

    def note_rule(p, q, *rest):
        if q is not None:
            pairs.append((torch.stack(drawn[-q.shape[1] :], dim=1), q))
        return right_rule(p, q, *rest)

    monkeypatch.setattr(drafters.eagle3.paged, "draw", note_draw)
    monkeypatch.setattr(serving.engine.verifying, "verify_block", note_rule)
    engine = exact_engine(model, "echo", suffix=False)
    run(engine, [request_of(str(i), [i, 2], 20, temperature=1.0) for i in range(5)])
    assert len(pairs) > 5
    return pairs


def test_the_rule_gets_the_very_q_that_was_drawn_from(model, monkeypatch):
    pairs = drawn_and_verified(model, monkeypatch)

    assert all(torch.equal(drawn, verified) for drawn, verified in pairs)


def test_a_rounded_q_is_seen(model, monkeypatch):
    """Too small for any sample, so it is not looked for in the law."""
    right = drafters.eagle3.paged.PagedEagle3.propose

    def propose(*args):
        draft = right(*args)
        return (
            draft if draft.q_RKV is None else replace(draft, q_RKV=draft.q_RKV.bfloat16().double())
        )

    monkeypatch.setattr(drafters.eagle3.paged.PagedEagle3, "propose", propose)

    pairs = drawn_and_verified(model, monkeypatch)

    assert not all(torch.equal(drawn, verified) for drawn, verified in pairs)
