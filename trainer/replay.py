"""Samples that the trainer holds, and the choice of the next batch.

``policies.replay`` decides which traces are kept; this module holds their samples and counts how
often each was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import TrainerSettings
from drafters.samples import Piece, Sample
from policies.replay import Replay, add, is_held_out


@dataclass(slots=True)
class Memory:
    """Samples held, and their counters."""

    settings: TrainerSettings
    seed: int
    replay: Replay[Sample]
    judges: Replay[Sample]
    """Never trained on: the newest show what was learnt, the sample of older ones what was kept."""
    visits: dict[str, int]
    """Sample key -> number of batches it was in."""
    num_samples: int = 0
    """Training samples ever taken in."""
    fresh_rows: int = 0
    """Their rows with a loss."""
    trained_rows: int = 0
    """Rows with a loss that updates were trained on, counted each time."""

    def take_in(self, samples: Sequence[Sample]) -> None:
        """Split new samples into held-out and training samples."""
        s = self.settings
        judges = [x for x in samples if is_held_out(x.key, s.held_out_every)]
        training = [x for x in samples if not is_held_out(x.key, s.held_out_every)]
        self.judges = add(
            self.judges,
            judges,
            recent_traces=s.held_out_traces,
            reservoir_traces=s.held_out_traces,
            seed=self.seed,
        )
        self.replay = add(
            self.replay,
            training,
            recent_traces=s.recent_traces,
            reservoir_traces=s.reservoir_traces,
            seed=self.seed,
        )
        self.num_samples += len(training)
        self.fresh_rows += sum(x.num_loss_rows for x in training)
        held = {x.key for x in self.samples()}
        self.visits = {key: n for key, n in self.visits.items() if key in held}

    @property
    def held_out(self) -> tuple[Sample, ...]:
        """Newest held-out samples, oldest first."""
        return self.judges.recent

    @property
    def held_out_older(self) -> tuple[Sample, ...]:
        """Uniform sample of the held-out samples before ``held_out``."""
        return self.judges.reservoir

    def samples(self) -> tuple[Sample, ...]:
        """All training samples held."""
        return (*self.replay.recent, *self.replay.reservoir)

    def waits_for(self) -> str | None:
        """What the next update waits for; ``None`` if it can start."""
        s = self.settings
        if self.num_samples < s.min_traces:
            return f"traces: {self.num_samples} of trainer.min_traces={s.min_traces}"
        if self.trained_rows + s.batch_tokens > s.replay_ratio * self.fresh_rows:
            seen = self.trained_rows / self.fresh_rows
            return (
                f"fresh traces: {self.fresh_rows} rows were seen {seen:.2f} times, "
                f"trainer.replay_ratio={s.replay_ratio:g}"
            )
        return None

    def draw(self, random: np.random.Generator) -> list[tuple[Sample, Piece]]:
        """Draw the pieces of the next batch, up to ``batch_tokens`` tokens, and count the visits.

        Most come from the samples trained on least often, so that new traffic is learnt first and
        every sample gets its turn. A share of ``reservoir_share`` is drawn uniformly from all
        samples held, reservoir included, so that old traffic is not forgotten.
        """
        everything = self.samples()
        luck = random.random(len(everything))
        passes = [self.visits.get(x.key, 0) / len(x.pieces) for x in everything]
        by_need = np.lexsort((luck, np.asarray(passes)))
        by_luck = random.permutation(len(everything))
        take_any = random.random(2 * len(everything)) < self.settings.reservoir_share
        order = _interleave(by_need.tolist(), by_luck.tolist(), take_any.tolist())
        parts: list[tuple[Sample, Piece]] = []
        num_tokens = 0
        for sample in (everything[i] for i in order):
            piece = sample.pieces[int(random.integers(len(sample.pieces)))]
            num_tokens += piece.stop - piece.start
            if parts and num_tokens > self.settings.batch_tokens:
                break
            parts.append((sample, piece))
            self.visits[sample.key] = self.visits.get(sample.key, 0) + 1
        return parts

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint. Samples are saved by key; the trace log still holds them."""
        return {
            "recent": [x.key for x in self.replay.recent],
            "reservoir": [x.key for x in self.replay.reservoir],
            "num_left": self.replay.num_left,
            "held_out": [x.key for x in self.judges.recent],
            "held_out_older": [x.key for x in self.judges.reservoir],
            "held_out_left": self.judges.num_left,
            "visits": self.visits,
            "num_samples": self.num_samples,
            "fresh_rows": self.fresh_rows,
            "trained_rows": self.trained_rows,
        }


def new_memory(settings: TrainerSettings, seed: int) -> Memory:
    """Empty memory."""
    return Memory(settings, seed, Replay(), Replay(), {})


def keys_in(stored: dict[str, Any]) -> set[str]:
    """Keys of all samples that ``restore`` needs."""
    names = ("recent", "reservoir", "held_out", "held_out_older")
    return {key for name in names for key in stored[name]}


def restore(
    settings: TrainerSettings, seed: int, stored: dict[str, Any], found: dict[str, Sample]
) -> Memory:
    """Memory from ``Memory.to_json``, without the samples that are no longer in the log."""

    def present(keys: Iterable[str]) -> tuple[Sample, ...]:
        return tuple(found[key] for key in keys if key in found)

    return Memory(
        settings,
        seed,
        Replay(present(stored["recent"]), present(stored["reservoir"]), stored["num_left"]),
        Replay(
            present(stored["held_out"]),
            present(stored["held_out_older"]),
            stored["held_out_left"],
        ),
        dict(stored["visits"]),
        stored["num_samples"],
        stored["fresh_rows"],
        stored["trained_rows"],
    )


def _interleave(needed: list[int], lucky: list[int], take_lucky: list[bool]) -> list[int]:
    """Each index once, taken from the front of the list that ``take_lucky`` selects."""
    queues = {False: iter(needed), True: iter(lucky)}
    drawn = [next(queues[choice], None) for choice in take_lucky]
    return list(dict.fromkeys(index for index in (*drawn, *needed) if index is not None))
