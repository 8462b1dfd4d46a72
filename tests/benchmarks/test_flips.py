"""Counting seeded answers that change: what has changed is counted, and nothing else."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

import serving.engine.rounds
from benchmarks import numerics
from benchmarks.harness import flips
from benchmarks.harness.flips import (
    Answer,
    Count,
    Kept,
    Side,
    Way,
    compare,
    decode,
    differs_at,
    load,
    name_of,
    save,
    ways,
)
from oracles.engines import RandomPolicy
from serving.requests import Request, SamplingParams
from tests.benchmarks.built import built_over

BATCH = 3
ENDLESS = 1e6
"""Seconds, more than any machine needs."""
PLAIN = ways(BATCH)[0]
DRAFTED = next(way for way in ways(BATCH) if way.draft_k == 4 and not way.is_slow)


def over(*tokens: int) -> Answer:
    return Answer(tokens, is_over=True)


def begun(*tokens: int) -> Answer:
    return Answer(tokens, is_over=False)


def side() -> Side:
    built = built_over(RandomPolicy(), suffix=False)
    return Side(built.service, built.policy)


def seeded(count: int, max_tokens: int = 12) -> list[Request]:
    """Requests with seeds, whose prompts and lengths differ."""
    numbers = random.Random(0)
    made = []
    for seed in range(count):
        prompt = tuple(numbers.choices(range(96), k=numbers.randint(1, 9)))
        sampling = SamplingParams(
            temperature=0.7, max_tokens=max_tokens - seed % 3, seed=seed, ignore_eos=True
        )
        made.append(Request(name_of(prompt, seed), prompt, sampling, capture=False))
    return made


@pytest.mark.parametrize(
    ("first", "other", "place"),
    [
        (over(1, 2, 3), over(1, 2, 3), None),
        (over(1, 2, 3), over(1, 9, 3), 1),
        (over(1, 2, 3), over(1, 2), 2),
        (over(1, 2), over(1, 2, 3), 2),
        (over(), over(5), 0),
        (over(1, 2, 3), begun(1, 2), None),
        (over(1, 2, 3), begun(), None),
        (over(1, 2, 3), begun(1, 2, 3), None),
        (over(1, 2, 3), begun(1, 9), 1),
        (over(1, 2, 3), begun(1, 2, 3, 4), 3),
        (begun(1, 2), over(1, 2, 3), None),
        (begun(1, 2, 3), over(1, 2), 2),
        (begun(1, 2), begun(1, 2, 3), None),
        (begun(1, 2), begun(7, 2, 3), 0),
    ],
)
def test_a_beginning_is_no_change_and_an_end_is_a_token(first, other, place):
    assert differs_at(first, other) == place


def test_what_follows_a_change_is_not_compared():
    first = {"a": over(1, 2, 3, 4), "b": over(5, 6, 7), "c": over(8), "d": begun(1, 2)}
    other = {"a": over(1, 9, 9, 9), "b": begun(5, 6), "d": over(1, 2, 3), "e": over(4)}

    done, changed = compare(first, other)

    assert done == Count(answers=3, cut_short=2, tokens=2 + 2 + 2, flips=1)
    assert changed == [{"request": "a", "at": 1, "first": (2,), "other": (9,)}]


def test_rates_are_of_tokens_compared():
    count = Count(tokens=2_000_000, flips=3, decoded=400, seconds=2.0)

    assert count.flips_per_million == 1.5
    assert count.tokens_per_s == 200
    assert Count().flips_per_million is None
    assert Count().flips_per_million_below is None
    assert Count().tokens_per_s is None


def test_without_a_change_the_bound_is_three_by_the_tokens():
    assert Count(tokens=10**6).flips_per_million_below == pytest.approx(-math.log(0.05))
    assert Count(tokens=10**6, flips=5).flips_per_million_below == pytest.approx(10.513, abs=1e-3)


def test_seeded_answers_are_the_same_in_all_ways_and_after_a_restart():
    kept, made = Kept({}), []

    def make() -> Side:
        made.append(side())
        return made[-1]

    flips.count(kept, make, seeded(40), BATCH, 700, ENDLESS)

    assert len(made) == 2
    assert kept.total.flips == 0
    assert kept.total.tokens >= 700
    names = [way.name for way in ways(BATCH)]
    assert [way for way, restarted in kept.counts if not restarted] == names[1:]
    assert [way for way, restarted in kept.counts if restarted] == names
    assert all(answer.is_over for answer in kept.first.values())


def test_a_run_goes_on_from_the_answers_of_the_one_before(tmp_path):
    requests = seeded(60)
    kept = load(tmp_path / "kept.json", {"gpu": "a"})
    flips.count(kept, side, requests, BATCH, 300, ENDLESS)
    save(tmp_path / "kept.json", kept)

    again = load(tmp_path / "kept.json", {"gpu": "a"})
    assert (again.first, again.counts) == (kept.first, kept.counts)
    flips.count(again, side, requests, BATCH, 800, ENDLESS)

    assert again.total.tokens >= 800 > kept.total.tokens
    assert kept.first.items() < again.first.items()
    assert again.total.flips == 0


def test_when_enough_is_counted_no_engine_is_built():
    kept = Kept({}, counts={("plain", True): Count(tokens=500)})

    flips.count(kept, lambda: pytest.fail("built"), seeded(3), BATCH, 500, ENDLESS)

    assert kept.total.tokens == 500


def test_answers_of_another_device_are_not_compared(tmp_path):
    save(tmp_path / "kept.json", Kept({"gpu": "a", "torch": "2"}))

    with pytest.raises(ValueError, match=r"another gpu: \{'gpu': 'a'\}; here \{'gpu': 'b'\}"):
        load(tmp_path / "kept.json", {"gpu": "b", "torch": "2"})


def test_cancelled_answers_are_beginnings():
    """The batch is cancelled in the middle of its answers, as when time runs out."""
    one, requests = side(), seeded(6, max_tokens=40)
    first, _ = decode(one, requests, PLAIN, ENDLESS)
    engine, steps = one.service.engine, 0
    step = engine.step

    def until_time_is_over() -> bool:
        nonlocal steps
        steps += 1
        if steps == 20:
            engine.inbox.cancel_all()
        return step()

    engine.step = until_time_is_over
    found, _ = decode(one, requests[:BATCH], PLAIN, ENDLESS)
    done, changed = compare(first, found)

    assert done.cut_short == BATCH
    assert 0 < done.tokens < sum(len(first[name].tokens) for name in found)
    assert (done.flips, changed) == (0, [])


def test_time_that_is_over_cuts_answers_short():
    one, requests = side(), seeded(6)
    first, _ = decode(one, requests, PLAIN, ENDLESS)

    found, spent = decode(one, requests, PLAIN, 1e-9)

    assert not any(answer.is_over for answer in found.values())
    assert spent.decoded == sum(len(answer.tokens) for answer in found.values())
    assert compare(first, found)[0].flips == 0


def numbered_anew(monkeypatch, is_wrong):
    """Bug: a seeded request draws other numbers where ``is_wrong`` says so."""
    right = serving.engine.rounds.open_round

    def wrong(state, inputs_RI, num_draft, *args, **options):
        opened = right(state, inputs_RI, num_draft, *args, **options)
        if not is_wrong(num_draft, opened):
            return opened
        nonces = opened.nonces_R.clone()
        nonces[0] = 7
        return replace(opened, nonces_R=nonces)

    monkeypatch.setattr(serving.engine.rounds, "open_round", wrong)


def test_one_answer_that_changes_once_is_one_flip(monkeypatch):
    one, requests = side(), seeded(9)
    first, _ = decode(one, requests, PLAIN, ENDLESS)
    rounds = []

    def is_wrong(num_draft, opened):
        rounds.append(num_draft)
        return len(rounds) == 4

    numbered_anew(monkeypatch, is_wrong)
    found, _ = decode(one, requests, DRAFTED, ENDLESS)
    done, changed = compare(first, found)

    assert (done.answers, done.flips, len(changed)) == (9, 1, 1)
    place, name = changed[0]["at"], changed[0]["request"]
    assert first[name].tokens[:place] == found[name].tokens[:place]
    assert changed[0]["first"] != changed[0]["other"]
    whole = sum(len(answer.tokens) for answer in first.values())
    assert done.tokens == whole - len(first[name].tokens) + place + 1


def test_a_dependence_on_k_is_counted_in_the_ways_that_have_it(monkeypatch):
    numbered_anew(monkeypatch, lambda num_draft, _opened: num_draft > 4)
    kept = Kept({})

    flips.count(kept, side, seeded(30), BATCH, 900, ENDLESS)

    changed = {way for (way, _), done in kept.counts.items() if done.flips}
    assert "K = 7" in changed
    assert changed <= {way.name for way in ways(BATCH) if way.draft_k in (7, None)}
    assert kept.examples[0]["way"] in changed


def test_a_dependence_on_the_batch_is_counted(monkeypatch):
    numbered_anew(monkeypatch, lambda _num_draft, opened: len(opened.nonces_R) == 1)
    one, requests = side(), seeded(9)
    first, _ = decode(one, requests, PLAIN, ENDLESS)

    found, _ = decode(one, requests, Way("batch 1, plain", 1, 0), ENDLESS)

    assert compare(first, found)[0].flips > 0


def test_a_way_without_time_leaves_its_part_to_the_others(monkeypatch):
    monkeypatch.setattr(flips, "SLOW_SHARE", 0.0)
    kept = Kept({})

    flips.count(kept, side, seeded(40), BATCH, 700, ENDLESS)

    assert kept.total.tokens >= 700
    assert all(kept.counts[way.name, True].tokens < BATCH * 8 for way in ways(BATCH) if way.is_slow)


def test_a_goal_is_of_pinned_numerics_alone():
    kept = Kept({}, counts={("plain", True): Count(tokens=10**6, flips=1)})

    pinned, fast = list(numerics.flip_rows("pinned", kept)), list(numerics.flip_rows("fast", kept))

    assert [row.holds for row in pinned] == [False, False]
    assert [(row.value, row.goal) for row in fast] == [(10**6, None), (1.0, None)]


def test_figures_that_were_not_measured_again_stay(tmp_path):
    out = tmp_path / "numerics.json"
    price = [{"batch": 1, "draft_k": 0, "pinned_over_fast": 0.8}]
    numerics.write_result(out, numerics.merged(out, "price", price, "batch"))
    counted = [numerics.figures_of(name, Kept({})) for name in ("pinned", "fast")]
    numerics.write_result(out, numerics.merged(out, "flips", counted, "numerics"))
    again = {**counted[0], "examples": ["new"]}

    merged = numerics.merged(out, "flips", [again], "numerics")

    assert merged["price"] == price
    assert sorted((row["numerics"], row["examples"]) for row in merged["flips"]) == [
        ("fast", []),
        ("pinned", ["new"]),
    ]


def test_a_request_has_its_name_whatever_other_prompts_there_are():
    prompts = {"code": [((1, 2), 5), ((3,), 6)], "summary": [((1, 2), 7)]}
    few = numerics.Traffic({"code": prompts["code"][1:]}, 0.7, 8)
    all_of_them = numerics.Traffic(prompts, 0.7, 8)

    names = [request.id for request in numerics.requests_of(all_of_them)]

    assert len(set(names)) == 3
    assert [request.id for request in numerics.requests_of(few)] == [name_of((3,), 6)]
    assert name_of((3,), 6) in names
