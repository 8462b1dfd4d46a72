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
| ``test_a_shape_that_verification_forgets_is_seen``; ``test_adjusting`` |
| M11 | greedy verification of sampled requests | ``rule-m11`` here |
| M12 | block acceptance, residual of the standard rule | ``test_verification_is_exact`` |
| M13 | 24-bit numbers | ``test_joint_law`` |
| M14 | q of lower precision than what was drawn from | ``test_another_q_is_seen`` |
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
| M23 | a policy drops a draft token because its own probability is low | ``rule-m23`` here |

M3 to M6, M8, M9, M11, M15, M17 and M19 are planted around the kernels too
(``oracles/device_bugs.py``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import serving.engine.drafts
import serving.engine.prefill
import serving.engine.rounds
from oracles.device_bugs import untempered
from oracles.engines import random_model, request_of, run
from oracles.joint_law import (
    Cut,
    Parts,
    Seen,
    Setting,
    expected_law,
    law_excess,
    sample,
    tables_of,
)
from oracles.plain_reference import decode
from oracles.random_requests import every_shape, exact_engine, twice
from specops.draft_sampling import DraftLaw
from specops.lanes import Field
from specops.sampling import draw
from specops.verify import Verdict, verify_match

# ---- in the rule: seen by the joint law of 50,000 samples ---------------------------------------

SETTING = Setting(temperature=1.5, cut=Cut.NOTHING, num_draft=2)
"""Three tokens are looked at, so that the bonus after two drafted ones is among them."""
NUM_SAMPLES = 50_000


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


def ended_where(goes_on_RK, seen, rule):
    """A policy ends drafts before the first token for which it does not go on."""
    lens = torch.minimum(seen.lens, goes_on_RK.long().cumprod(dim=1).sum(dim=1))
    return replace(seen, lens=lens).verdict(rule)


def m23(seen, rule):
    drawn = seen.q.gather(-1, seen.draft[..., None])[..., 0]
    return ended_where(drawn > 0.2, seen, rule)


def confident(seen, rule):
    """What M23 should have looked at: the law before the token is drawn."""
    return ended_where(seen.q.amax(-1) > 0.4, seen, rule)


MUTANTS = {
    **{
        f.__name__: Parts(verify=f)
        for f in (m1, m2, m3, m6, m7, m8, m9, m11, m15, m16, m20, m21, m23)
    },
    "m4": Parts(draw_draft=lambda q, u: q.argmax(-1)),
    "m5": Parts(hand_over=lambda drawn, raw: raw),
    "m19": Parts(hand_over=lambda drawn, raw: drawn.roll(1, dims=-1)),
}


def excess(parts, rule, regime):
    tables = tables_of(regime)
    counts, _ = sample(SETTING, tables, rule, NUM_SAMPLES, parts)
    return law_excess(counts, expected_law(SETTING, tables))


@pytest.mark.parametrize("rule", ["block", "standard"])
def test_a_policy_that_looks_at_the_law_instead_of_the_token_is_no_bug(rule):
    for regime in ("close", "opposed"):
        assert excess(Parts(verify=confident), rule, regime) < 1


@pytest.mark.parametrize("rule", ["block", "standard"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_in_the_rule_is_seen_with_one_drafter_or_the_other(name, rule):
    """Some bugs need two: M20, under the standard rule, is invisible with an opposed drafter."""
    assert any(excess(MUTANTS[name], rule, regime) > 1 for regime in ("close", "opposed"))


@pytest.mark.parametrize("rule", ["block", "standard"])
@pytest.mark.parametrize("regime", ["close", "opposed"])
def test_where_nothing_is_planted_nothing_is_seen(rule, regime):
    assert excess(Parts(), rule, regime) < 1


# ---- in how the engine calls it: seen by answers that must equal the plain reference ------------

V = 288
PROGRAMS = serving.engine.rounds, serving.engine.prefill


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=V).double()


@pytest.fixture(scope="module")
def by_the_book(model):
    return {r.id: decode(model, r) for r in every_shape()}


def wrong_answers(model, by_the_book, **options):
    """Requests that are answered otherwise than by the plain reference, at the first step with
    one."""
    engine = exact_engine(model, "echo", **{"max_batch": 8, **options})

    def wrong(got):
        return {
            name
            for name, c in got.items()
            if c.token_ids != by_the_book[name.split()[0]][: len(c.token_ids)]
        }

    got = run(engine, twice(every_shape()), until=wrong)
    assert wrong(got) or all(len(c.token_ids) == 8 for c in got.values())
    return wrong(got)


def without_penalty(column, neutral):
    """Logits adjusted with one penalty at its neutral value."""

    def change(right):
        def adjust(logits, draft, requests, tables):
            penalties = tables.penalties_L3.clone()
            penalties[:, column] = neutral
            return right(logits, draft, requests, replace(tables, penalties_L3=penalties))

        return adjust

    return "adjust_rows", change


def without_bias():
    def change(right):
        def adjust(logits, draft, requests, tables):
            none = torch.zeros_like(tables.bias_LB)
            return right(logits, draft, requests, replace(tables, bias_LB=none))

        return adjust

    return "adjust_rows", change


def opened(edit):
    """Rounds that open with other fields than their lanes hold."""

    def change(right):
        def open_round(*arguments, **options):
            return edit(right(*arguments, **options))

        return open_round

    return "open_round", change


def without_shape(row, neutral):
    """A real-valued field at its neutral value."""

    def edit(round_):
        reals = round_.floats_3R.clone()
        reals[row] = torch.where(reals[0] > 0, neutral, reals[row])  # greedy requests stay greedy
        return replace(round_, floats_3R=reals)

    return opened(edit)


def without_top_k():
    def edit(round_):
        fields = round_.ints_FR.clone()
        fields[Field.TOP_K] = V
        return replace(round_, ints_FR=fields)

    return opened(edit)


def plant(monkeypatch, mutant):
    name, change = mutant
    for module in PROGRAMS:
        monkeypatch.setattr(module, name, change(getattr(module, name)))


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(without_penalty(0, 0.0), id="presence_penalty"),
        pytest.param(without_penalty(1, 0.0), id="frequency_penalty"),
        pytest.param(without_penalty(2, 1.0), id="repetition_penalty"),
        pytest.param(without_bias(), id="logit_bias"),
        pytest.param(without_shape(0, 0.5), id="temperature"),
        pytest.param(without_top_k(), id="top_k"),
        pytest.param(without_shape(1, 1.0), id="top_p"),
        pytest.param(without_shape(2, 0.0), id="min_p"),
    ],
)
def test_a_shape_that_verification_forgets_is_seen(model, by_the_book, monkeypatch, mutant):
    plant(monkeypatch, mutant)

    assert wrong_answers(model, by_the_book)


def test_a_row_with_the_shape_of_another_is_seen(model, by_the_book, monkeypatch):
    def mixed_up(round_):
        if round_.floats_3R.shape[1] <= 2:
            return round_
        return replace(round_, floats_3R=round_.floats_3R.roll(1, dims=1))

    # In rounds alone: programs of prompts are padded with a lane that belongs to nobody.
    name, change = opened(mixed_up)
    monkeypatch.setattr(serving.engine.rounds, name, change(serving.engine.rounds.open_round))

    assert not wrong_answers(model, by_the_book, max_batch=2)
    assert wrong_answers(model, by_the_book, max_batch=8)


def one_key(round_):
    fields = round_.ints_FR.clone()
    fields[Field.KEY] = fields[Field.KEY, 0]
    return replace(round_, ints_FR=fields)


def test_rows_that_share_a_number_are_seen(model, by_the_book, monkeypatch):
    plant(monkeypatch, opened(one_key))

    assert wrong_answers(model, by_the_book, max_batch=8)
    assert not wrong_answers(model, by_the_book, max_batch=1)


def test_numbers_that_move_with_the_rounds_are_seen(model, monkeypatch):
    """A round that starts elsewhere has other numbers: answers with and without drafts differ."""

    def by_round(round_):
        return replace(round_, nonces_R=round_.ints_FR[Field.NONCE] + 1)

    def tokens(max_draft):
        got = run(exact_engine(model, "echo", max_draft=max_draft), twice(every_shape()))
        return {name: collected.token_ids for name, collected in got.items()}

    assert tokens(max_draft=8) == tokens(max_draft=0)
    plant(monkeypatch, opened(by_round))
    assert tokens(max_draft=8) != tokens(max_draft=0)


def num_distinct(model):
    """Different answers to 32 equal requests without a seed."""
    engine = exact_engine(model, "echo", max_batch=32)
    got = run(engine, [request_of(str(i), [1, 2], 8, temperature=1.5) for i in range(32)])
    return len({tuple(collected.token_ids) for collected in got.values()})


def test_requests_without_a_seed_are_answered_independently(model, monkeypatch):
    assert num_distinct(model) == 32
    plant(monkeypatch, opened(one_key))
    assert num_distinct(model) < 12


# ---- M14 -----------------------------------------------------------------------------------------


def drawn_and_verified(model, monkeypatch):
    """What each draft token of a round was drawn from and under, and the law that verification got
    of them, by round."""
    drawn, pairs = [], []
    right_draw, right_rule = serving.engine.drafts.sample_draft, serving.engine.rounds.verify_logits

    def note_draw(logits, sampling, numbering, greedy, vocab, **options):
        drawn.append((logits.clone(), sampling, greedy, vocab))
        return right_draw(logits, sampling, numbering, greedy, vocab, **options)

    def note_rule(logits, sampling, draft, lens, rules, numbering, law):
        if law is not None:
            pairs.append((drawn[-draft.shape[1] :], law))
        return right_rule(logits, sampling, draft, lens, rules, numbering, law)

    monkeypatch.setattr(serving.engine.drafts, "sample_draft", note_draw)
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
    monkeypatch.setattr(serving.engine.drafts, "DraftLaw", bug)

    assert not any(is_very_q(*pair) for pair in drawn_and_verified(model, monkeypatch))
