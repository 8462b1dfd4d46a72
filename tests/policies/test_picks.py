"""Within a mix each request gets the drafter that keeps the most of it, and trying is bounded."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from policies.acceptance import AcceptanceModel
from policies.interface import DraftRecord, StepObs
from policies.picks import Picker, expected_kept, needing_match, rows_of, with_mixes
from tests.policies.simulated import INDEX, NEURAL, Traits

MIXES = {"a+b": ("a", "b")}
K = 4


def model(a=0.7, b=0.7):
    """Both drafters are known well."""
    made = AcceptanceModel(200.0, {"a": NEURAL, "b": NEURAL}, K)
    rng = random.Random(0)
    for kind, hazard in (("a", a), ("b", b)):
        for _ in range(200):
            kept = next((j for j in range(K) if rng.random() >= hazard), K)
            made.tick(1)
            made.observe(kind, {0: Counter({(K, kept): 1})}, 1)
    return made


def picker(acceptance=None, explore=0.0, seed=0):
    return Picker(MIXES, acceptance or model(), explore, seed)


def obs(*records):
    count = len(records)
    return StepObs(0, count, bytes((K,)) * count, None, ("a", "b", "a+b"), K, 0, records=records)


def record(rounds, kept_each):
    return DraftRecord(rounds, K * rounds, kept_each * rounds)


def test_each_request_gets_the_drafter_that_has_kept_more_of_it():
    code, prose = {"a": record(8, 3.5), "b": record(8, 0.5)}, {"a": record(8, 0.2)}

    picks = picker().pick(obs(code, prose), "a+b", K)

    assert [one.drafter for one in picks] == ["a", "b"]
    assert {(one.propensity, one.reason) for one in picks} == {(1.0, "best")}


def test_a_request_without_a_record_gets_the_drafter_that_is_better_on_all():
    assert picker(model(a=0.4, b=0.8)).pick(obs({}), "a+b", K)[0].drafter == "b"


def test_one_unlucky_round_does_not_outweigh_what_is_known_of_all_requests():
    usual = [0.0, 0.8, 1.44, 1.95, 2.36]
    unlucky = expected_kept(usual, K, DraftRecord(1, K, 0))

    assert unlucky == pytest.approx(0.8 * usual[K])
    assert expected_kept(usual, K, None) == usual[K]
    assert expected_kept(usual, 1, record(100, 2.36)) == pytest.approx(usual[1])


def test_trying_loses_a_hundredth_of_the_tokens_at_most():
    bad = model(a=0.8, b=0.02)
    made = picker(bad, explore=0.5)
    expected = {kind: bad.expected_tokens(kind)[0, K] for kind in ("a", "b")}
    tokens = lost = 0.0
    tried = 0
    for _ in range(2_000):
        (pick,) = made.pick(obs({"a": record(20, 2.4), "b": record(20, 0.0)}), "a+b", K)
        tokens += expected["a"]
        if pick.drafter == "b":
            tried += 1
            lost += expected["a"] - expected["b"]

    assert tried > 5
    assert lost < 0.013 * tokens + 3


def test_propensities_are_the_frequencies_of_what_is_picked():
    made = picker(model(a=0.7, b=0.7), explore=0.1)
    made.account = 1e9
    known = {"a": record(20, 1.5), "b": record(20, 1.4)}
    tries = 0
    for _ in range(3_000):
        made.account = 15.0
        (pick,) = made.pick(obs(known), "a+b", K)
        assert (pick.reason, pick.propensity) in {("best", 0.9), ("try", 0.1)}
        tries += pick.reason == "try"
    assert 200 < tries < 400


def test_a_drafter_that_has_hardly_drafted_for_a_request_is_tried_sooner():
    made = picker(explore=0.1)
    made.account = 15.0
    (pick,) = made.pick(obs({"a": record(20, 2.0)}), "a+b", K)
    assert pick.propensity in (pytest.approx(0.6), pytest.approx(0.4))


def test_a_mix_takes_the_time_of_all_members_and_promises_the_best_of_them():
    drafters = {"a": Traits(True, False, (0.5,), 0.1), "b": Traits(True, False, (0.7,), 0.2)}

    mixed = with_mixes(drafters, MIXES)["a+b"]

    assert mixed.prior_acceptance == (0.7,)
    assert mixed.prior_draft_cost == pytest.approx(0.3)
    assert mixed.on_device and not mixed.needs_match


WITH_INDEX = {"a+b": ("a", "b"), "a+i": ("a", "i")}
OF_INDEX = {"a": NEURAL, "b": NEURAL, "i": INDEX}


def picks_with_matches(matches, explore=0.0, records=None):
    made = AcceptanceModel(200.0, OF_INDEX, K)
    picker = Picker(WITH_INDEX, made, explore, 0, ["i"])
    picker.account = 1e9
    own = records or ({},) * len(matches)
    caps, kinds = bytes((K,)) * len(matches), ("a", "i", "a+i")
    seen = StepObs(0, len(matches), caps, bytes(matches), kinds, K, 0, records=own)
    return picker.pick(seen, "a+i", K)


def test_the_kind_of_its_match_decides_who_drafts_for_a_request():
    picks = picks_with_matches((0, 1, 5))

    assert [one.drafter for one in picks] == ["a", "a", "i"]


def test_an_index_is_not_even_tried_without_a_match():
    picks = picks_with_matches((0,) * 500, explore=0.5)

    assert {(one.drafter, one.propensity) for one in picks} == {("a", 1.0)}
    tried = picks_with_matches((1,) * 500, explore=0.5)
    assert {one.drafter for one in tried} == {"a", "i"}


def test_what_an_index_kept_with_other_matches_does_not_count():
    unlucky = {"i": record(20, 0.1), "a": record(20, 2.0)}
    assert picks_with_matches((5,), records=(unlucky,))[0].drafter == "i"


def test_a_mix_with_an_index_needs_a_match_and_the_rows_of_its_neural_members_alone():
    assert needing_match(OF_INDEX, WITH_INDEX) == {"i", "a+i"}
    assert rows_of(OF_INDEX, WITH_INDEX) == {
        "a": {"a"}, "b": {"b"}, "a+b": {"a", "b"}, "a+i": {"a"},
    }  # fmt: skip
    mixed = with_mixes(OF_INDEX, WITH_INDEX)["a+i"]
    assert mixed.prior_acceptance == NEURAL.prior_acceptance
    assert mixed.on_device and not mixed.needs_match
