"""Every sample gets its turn, within ``replay_ratio``; held-out samples are never trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafters.samples import Sample
from policies.replay import is_held_out
from tests.trainer.conftest import World
from tests.trainer.traffic import HIDDEN, LAYER_IDS, VOCAB, settings_for
from trainer.dataset import Expected, sample_of
from trainer.replay import Memory, keys_in
from trainer.rows import PAGE, RowStore
from trainer.turns import Turns


def samples_of(world: World) -> list[Sample]:
    expected = Expected(world.fingerprint, LAYER_IDS, HIDDEN, VOCAB)
    samples = [sample_of(trace, expected, 64) for trace in world.traces]
    return [sample for sample in samples if isinstance(sample, Sample)]


def memory_of(world: World, num_bytes: int = 1 << 22, **trainer: object) -> Memory:
    settings = settings_for(world.target, world.target, **trainer)
    return Memory(settings.trainer, 0, RowStore(torch.device("cpu"), num_bytes))


def test_traces_that_judge_never_teach(world: World) -> None:
    memory = memory_of(world)
    memory.take_in(samples_of(world))
    judges = {x.key for x in memory.held_out}

    drawn = {x.key for _ in range(60) for x, _ in memory.draw(np.random.default_rng(0))}

    assert judges == {x.key for x in samples_of(world) if is_held_out(x.key, 6)}
    assert judges and not judges & drawn
    assert len(drawn) + len(judges) == len(world.traces)


def test_new_traces_are_learnt_before_known_ones(world: World) -> None:
    memory = memory_of(world, reservoir_share=0.0)
    old, new = samples_of(world)[:40], samples_of(world)[40:]
    memory.take_in(old)
    random = np.random.default_rng(0)
    for _ in range(20):
        memory.draw(random)

    memory.take_in(new)
    wanted = {x.key for x in memory.samples()} - set(memory.turns.by_key())
    drawn = [x.key for x, _ in memory.draw(random)]

    assert set(drawn) <= wanted


def test_turns_are_even(world: World) -> None:
    memory = memory_of(world, reservoir_share=0.0)
    memory.take_in(samples_of(world))
    random = np.random.default_rng(0)

    for _ in range(50):
        memory.draw(random)

    visits = memory.turns.visits.tolist()
    assert max(visits) - min(visits) <= 1


def test_a_share_of_each_batch_comes_from_everything_held(world: World) -> None:
    memory = memory_of(world, reservoir_share=0.5, recent_traces=10)
    memory.take_in(samples_of(world))
    reservoir = {x.key for x in memory.replay.reservoir}
    seen = dict.fromkeys(reservoir, 1000)  # nobody needs them
    memory.turns = Turns.of(memory.samples(), seen, {})

    random = np.random.default_rng(0)
    drawn = [x.key for _ in range(40) for x, _ in memory.draw(random)]

    share = sum(key in reservoir for key in drawn) / len(drawn)
    assert 0.2 < share < 0.7


def test_updates_wait_for_traces_then_for_fresh_ones(world: World) -> None:
    memory = memory_of(world, min_traces=30, replay_ratio=2.0)
    memory.take_in(samples_of(world)[:20])
    taken = memory.num_samples
    assert memory.waits_for() == f"traces: {taken} of trainer.min_traces=30"

    memory.take_in(samples_of(world)[20:])
    assert memory.waits_for() is None

    memory.trained_rows = 2 * memory.fresh_rows
    assert memory.waits_for() == (
        f"fresh traces: {memory.fresh_rows} rows were seen 2.00 times, trainer.replay_ratio=2"
    )


def test_a_batch_keeps_to_its_tokens(world: World) -> None:
    memory = memory_of(world)
    memory.take_in(samples_of(world))

    parts = memory.draw(np.random.default_rng(0))

    assert sum(len(piece.slots) for _, piece in parts) <= 256
    assert len({sample.key for sample, _ in parts}) == len(parts) == 256 // 36


def test_memory_survives_as_json_but_for_traces_that_left_the_log(world: World) -> None:
    memory = memory_of(world, recent_traces=20, reservoir_traces=10)
    memory.take_in(samples_of(world))
    memory.draw(np.random.default_rng(0))
    stored = memory.to_json()
    found = {x.key: x for x in samples_of(world)}
    gone = memory.replay.recent[0].key

    again = memory_of(world, recent_traces=20, reservoir_traces=10)
    again.restore(stored, found)
    without = memory_of(world, recent_traces=20, reservoir_traces=10)
    without.restore(stored, {k: x for k, x in found.items() if k != gone})

    assert again.to_json() == stored
    assert keys_in(without.to_json()) == keys_in(stored) - {gone}


def pages_held(memory: Memory) -> int:
    return sum(len(x.pages) for x in (*memory.samples(), *memory.held_out, *memory.held_out_older))


def test_rows_that_nobody_holds_give_back_their_memory(world: World) -> None:
    memory = memory_of(world, recent_traces=10, reservoir_traces=4, held_out_traces=2)
    samples = samples_of(world)

    for start in range(0, len(samples), 7):
        memory.take_in(samples[start : start + 7])

        assert memory.store.num_free == memory.store.num_pages - 1 - pages_held(memory)
    assert len(memory.samples()) == 14
    assert len({page for x in memory.samples() for page in x.pages}) == 14 * -(-36 // PAGE)


def test_fewer_traces_are_held_where_memory_is_short(world: World) -> None:
    samples = samples_of(world)
    slot_bytes = (len(LAYER_IDS) + 1) * HIDDEN * 2 + 20
    trace_bytes = -(-36 // PAGE) * PAGE * slot_bytes
    memory = memory_of(world, 20 * trace_bytes, recent_traces=30, reservoir_traces=30)

    memory.take_in(samples[:50])
    memory.take_in(samples[50:])

    arrived = [x.key for x in samples if not is_held_out(x.key, 6)]
    recent = [x.key for x in memory.replay.recent]
    held = [x.key for x in memory.samples()]
    assert 12 <= pages_held(memory) // 3 <= 20
    assert recent == arrived[-len(recent) :] and len(recent) >= 3
    assert memory.replay.reservoir and memory.held_out
    assert len(held) == len(set(held))
    assert memory.fresh_rows == sum(
        x.num_loss_rows for x in samples if not is_held_out(x.key, 6)
    )  # what was not kept counts as seen by the log


def test_a_trace_that_can_never_fit_is_an_error(world: World) -> None:
    memory = memory_of(world, 20_000)

    with pytest.raises(ValueError, match=r"raise trainer\.memory_fraction"):
        memory.take_in(samples_of(world)[:4])
