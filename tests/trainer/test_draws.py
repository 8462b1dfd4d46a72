"""Which samples a batch is made of: the same as ever by default, within caps, and the same after a
restart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffer.deletions import Owner
from buffer.records import Sampling
from configs.schema import TrainerSettings
from drafters.samples import Sample
from policies.draws.catalog import CATALOG
from tests.trainer.conftest import World
from tests.trainer.traffic import HIDDEN, LAYER_IDS, VOCAB
from trainer.dataset import Expected, cut, sample_of
from trainer.replay import Memory, keys_in
from trainer.rows import RowStore
from trainer.turns import Turns

TENANTS = ("big", "big", "big", "big", "big", "small", "other", "another")


def sample(number: int) -> Sample:
    length = 20 + (7 * number) % 50
    return Sample(
        f"p/1/{number}",
        torch.arange(length),
        torch.arange(length),
        torch.zeros((length, 2, 4), dtype=torch.bfloat16),
        None,
        cut(length, 5, 32),
        length - 6,
        Sampling({"temperature": 0.0}),
        number // 10,
        owner=Owner(TENANTS[number % 8], number),
        domain="code" if number % 3 else "",
        surprise=None if number % 5 == 0 else (number % 7) / 7,
    )


def memory_of(**trainer: Any) -> Memory:
    values: dict[str, Any] = {
        "recent_traces": 20,
        "reservoir_traces": 20,
        "held_out_every": 6,
        "batch_tokens": 256,
        "max_sequence": 32,
        "min_traces": 1,
        **trainer,
    }
    return Memory(TrainerSettings(**values), 3, RowStore(torch.device("cpu"), 1 << 22))


def drawn(memory: Memory, random: np.random.Generator) -> list[Any]:
    return [(s.key, len(p.slots), p.rows.tolist()) for s, p in memory.draw(random)]


def test_default_draws_are_those_of_before_rules_could_be_chosen() -> None:
    """The digest is that of the release before."""
    memory, random = memory_of(), np.random.default_rng(3)
    batches = []
    for start in range(0, 90, 10):
        memory.take_in([sample(number) for number in range(start, start + 10)])
        for _ in range(5):
            parts = memory.draw(random)
            batches.append([(s.key, int(p.slots[0]), len(p.slots)) for s, p in parts])

    assert batches[7][:2] == [("p/1/17", 839, 32), ("p/1/18", 880, 32)]
    digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    assert digest == "2d7406a057b48269c95d7972b64d20eee74f2f2441e37fa13673444444424866"


def test_a_batch_never_needs_more_samples_than_the_rule_is_asked_for() -> None:
    """Of samples with long and short pieces; the shortest ones bound the number."""
    memory, random = memory_of(batch_tokens=64), np.random.default_rng(3)
    memory.take_in([sample(number) for number in range(40)])
    most = memory.turns.most_within(64)
    lengths = sorted(min(len(p.slots) for p in x.pieces) for x in memory.samples())
    assert sum(lengths[: most - 1]) <= 64 < sum(lengths[:most])

    for _ in range(100):
        parts = memory.draw(random)
        assert len(parts) < most
        assert sum(len(p.slots) for _, p in parts) <= 64


def test_what_is_known_of_samples_stays_theirs_as_others_come_and_go() -> None:
    memory, random = memory_of(recent_traces=7, reservoir_traces=9), np.random.default_rng(3)
    visits: dict[str, int] = {}
    for start in range(0, 120, 8):
        memory.take_in([sample(number) for number in range(start, start + 8)])
        for _ in range(3):
            for held, _ in memory.draw(random):
                visits[held.key] = visits.get(held.key, 0) + 1
        turns = memory.turns
        assert turns.samples == memory.samples()
        known = {key: n for key, n in visits.items() if key in {x.key for x in turns.samples}}
        assert turns.by_key() == known
        again = Turns.of(memory.samples(), turns.by_key(), turns.arrivals())
        assert np.array_equal(again.facts, turns.facts)
        assert np.array_equal(again.surprise, turns.surprise, equal_nan=True)
        for numbers, name in ((turns.tenants, "tenant"), (turns.domains, "domain")):
            names = [getattr(x, name) for x in turns.samples]
            first = list(dict.fromkeys(names))
            assert numbers.tolist() == [first.index(one) for one in names]


CAPS: dict[str, dict[str, Any]] = {
    "without caps": {},
    "with caps": {"max_tenant_share": 0.3, "max_domain_share": 0.6},
}


@pytest.mark.parametrize("caps", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("rule", CATALOG)
def test_a_restart_draws_what_would_have_been_drawn(rule: str, caps: dict[str, Any]) -> None:
    samples = [sample(number) for number in range(120)]
    memory, random = memory_of(draw=rule, **caps), np.random.default_rng(3)
    for start in range(0, 80, 10):
        memory.take_in(samples[start : start + 10])
        drawn(memory, random)
    stored = json.loads(json.dumps([memory.to_json(), random.bit_generator.state]))

    again, random_again = memory_of(draw=rule, **caps), np.random.default_rng(99)
    again.restore(stored[0], {x.key: x for x in samples if x.key in keys_in(stored[0])})
    random_again.bit_generator.state = stored[1]

    def rest(memory: Memory, random: np.random.Generator) -> list[Any]:
        batches = []
        for start in range(80, 120, 10):
            batches += [drawn(memory, random) for _ in range(4)]
            memory.take_in(samples[start : start + 10])
        return batches

    batches = rest(memory, random)
    assert all(batches) and rest(again, random_again) == batches
    assert again.to_json() == memory.to_json()


@pytest.mark.parametrize("rule", CATALOG)
def test_no_tenant_and_no_domain_has_more_than_its_share_of_any_batch(rule: str) -> None:
    memory = memory_of(draw=rule, **CAPS["with caps"])
    memory.take_in([sample(number) for number in range(60)])
    random = np.random.default_rng(0)
    totals = []

    for _ in range(50):
        parts = memory.draw(random)
        total = sum(len(piece.rows) for _, piece in parts)
        totals.append(total)
        assert total > 10
        assert sum(len(piece.slots) for _, piece in parts) <= 256
        for name, share in (("tenant", 0.3), ("domain", 0.6)):
            for one in {getattr(s, name) for s, _ in parts}:
                rows = sum(len(p.rows) for s, p in parts if getattr(s, name) == one)
                assert rows <= share * total + 1e-9
    assert np.mean(totals) > 100  # of about 160 without caps


def test_a_shortened_piece_is_a_part_of_a_whole_one_with_as_much_context() -> None:
    memory = memory_of(draw="uniform", max_tenant_share=0.3)
    memory.take_in([sample(number) for number in range(60)])
    whole = {slot: p for s in memory.samples() for p in s.pieces for slot in p.slots[p.rows]}
    random = np.random.default_rng(0)
    pieces = [p for _ in range(20) for _, p in memory.draw(random)]

    shortened = starts = 0
    for piece in pieces:
        full = whole[piece.slots[piece.rows[0]]]
        at = full.slots.tolist().index(piece.slots[0])
        assert piece.slots.tolist() == full.slots[at : at + len(piece.slots)].tolist()
        if len(piece.rows) < len(full.rows):
            shortened += 1
            starts += at > 0
            assert len(piece.slots) == piece.rows[-1] + 2
            assert piece.rows[0] == full.rows[0]
            assert set(piece.slots[piece.rows]) <= set(full.slots[full.rows])
    assert shortened > 10 and starts > 5


def test_with_too_few_tenants_the_trainer_waits_and_says_for_what() -> None:
    memory = memory_of(max_tenant_share=0.25, replay_ratio=100.0)
    names = [number for number in range(60) if TENANTS[number % 8] in ("big", "small")]
    memory.take_in([sample(number) for number in names])
    random = np.random.default_rng(0)
    assert memory.waits_for() is None

    assert memory.draw(random) == []
    assert memory.waits_for() == (
        "traces of more tenants or domains: 2 tenants of the 4 or more that "
        "trainer.max_tenant_share=0.25 needs"
    )
    stored = memory.to_json()
    again = memory_of(max_tenant_share=0.25, replay_ratio=100.0)
    again.restore(stored, {x.key: x for x in map(sample, names)})
    assert again.waits_for() == memory.waits_for()

    memory.take_in([sample(number) for number in range(60) if number not in names])
    assert memory.waits_for() is None
    assert memory.draw(random)


def test_a_checkpoint_of_before_has_no_arrivals() -> None:
    memory = memory_of(draw="recency")
    memory.take_in([sample(number) for number in range(30)])
    stored = memory.to_json()
    del stored["arrivals"], stored["held_back"]
    again = memory_of(draw="recency")
    again.restore(stored, {f"p/1/{number}": sample(number) for number in range(30)})
    assert drawn(again, np.random.default_rng(0))


def test_arrivals_count_training_samples_in_order() -> None:
    memory = memory_of()
    memory.take_in([sample(number) for number in range(40)])
    recent = [memory.turns.arrivals()[x.key] for x in memory.replay.recent]
    assert recent == list(range(memory.num_samples - len(recent), memory.num_samples))
    memory.take_in([sample(number) for number in range(40, 90)])
    older = [memory.turns.arrivals()[x.key] for x in memory.replay.reservoir]
    assert max(older) < memory.num_samples - len(memory.replay.recent)
    assert len(set(older)) == len(older)


def test_a_sample_knows_tenant_domain_and_surprise_of_its_trace(world: World) -> None:
    expected = Expected(world.fingerprint, LAYER_IDS, HIDDEN, VOCAB, surprised="eagle3")
    trace = world.traces[0]  # one round, of a delta draft whose logp of -0.5 was rejected
    sampling = replace(trace.sampling, values={**trace.sampling.values, "domain": "code"})

    found = sample_of(replace(trace, tenant="acme", sampling=sampling), expected, 64)
    assert isinstance(found, Sample)
    assert (found.tenant, found.domain) == ("acme", "code")
    assert found.surprise == pytest.approx(1 - np.exp(-0.5), abs=1e-6)
    plain = sample_of(trace, replace(expected, surprised="another"), 64)
    assert isinstance(plain, Sample)
    assert (plain.domain, plain.surprise) == ("", None)


def test_an_unknown_rule_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    import threading

    from configs.choices import SettingsError
    from tests.trainer.traffic import settings_for
    from trainer.build import build_trainer

    settings = settings_for(tmp_path, tmp_path / "no target", draw="luck")
    with pytest.raises(SettingsError, match=r"trainer\.draw 'luck' is unknown; known: domains, "):
        build_trainer(settings, threading.Event())
