"""Samples that the trainer holds, and the choice of the next batch.

``policies.replay`` decides which traces are kept; this module keeps their rows in the store and
counts how often each was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from buffer.deletions import Owner
from configs.schema import TrainerSettings
from drafters.samples import Sample
from policies.draws.caps import Cap, rows_within, strata_needed
from policies.draws.catalog import draw_rule
from policies.draws.interface import Places, Pool
from policies.replay import Replay, add, is_held_out
from trainer.packing import HeldPiece
from trainer.rows import HeldSample, RowStore
from trainer.turns import Turns, num_pages_of

_SHRINK = 0.9
"""Factor of the numbers of traces held while their rows do not fit into the store."""
_ROOMY = 0.3
"""Free share of the store from which on more traces are held again."""

_TRIES = 4
"""Draws that may fail in a row because the pieces that were drawn fit no batch within the caps."""

Drawn = list[tuple[HeldSample, HeldPiece]]


@dataclass(slots=True)
class Memory:
    """Samples held, and their counters."""

    settings: TrainerSettings
    seed: int
    store: RowStore
    replay: Replay[HeldSample] = field(default_factory=Replay)
    judges: Replay[HeldSample] = field(default_factory=Replay)
    """Never trained on: the newest show what was learnt, the sample of older ones what was kept."""
    turns: Turns = field(default_factory=Turns)
    room: float = 1.0
    """Share of the settings' numbers of traces that fit into the store, as far as is known."""
    num_samples: int = 0
    """Training samples ever taken in."""
    num_held_out: int = 0
    """Held-out samples ever taken in."""
    fresh_rows: int = 0
    """Rows with a loss of all training samples."""
    trained_rows: int = 0
    """Rows with a loss that updates were trained on, counted each time."""
    held_back: str | None = None
    """Why the samples held make no batch."""
    num_stale: int = 0
    """Training samples dropped because their drafts were of too old a version."""

    def take_in(self, samples: Sequence[Sample]) -> None:
        """Split new samples into held-out and training samples, and upload those that are kept.

        Raises:
            ValueError: a single sample does not fit into the store.
        """
        if not samples:
            return
        self.store.prepare(samples[0])
        every = self.settings.held_out_every
        judges = [x for x in samples if is_held_out(x.key, every)]
        training = [x for x in samples if not is_held_out(x.key, every)]
        self._keep(training, judges)
        self.num_samples += len(training)
        self.num_held_out += len(judges)
        self.fresh_rows += sum(x.num_loss_rows for x in training)

    def forget(self, is_deleted: Callable[[Owner], bool]) -> int:
        """Drop the samples of deleted tenants, and overwrite their rows.

        Returns:
            How many they were.
        """
        held = (*_all(self.replay), *_all(self.judges))
        gone = [x for x in held if x.owner is not None and is_deleted(x.owner)]
        if gone:
            self.store.wipe(gone)
            self.store.drop(gone)
            keys = {x.key for x in gone}
            self.replay, self.judges = _without(self.replay, keys), _without(self.judges, keys)
            self.turns = Turns.of(self.samples(), self.turns.by_key(), self.turns.arrivals())
        return len(gone)

    def drop_older(self, version: int) -> int:
        """Drop the training samples whose newest draft is of an older version. Rows that no update
        has seen count no longer as fresh. Returns how many samples they were."""
        turns = self.turns
        is_old = (turns.versions >= 0) & (turns.versions < version)
        if not is_old.any():
            return 0
        gone = [turns.samples[place] for place in np.flatnonzero(is_old).tolist()]
        unseen = np.flatnonzero(is_old & (turns.visits == 0)).tolist()
        self.fresh_rows -= sum(turns.samples[place].num_loss_rows for place in unseen)
        self.store.drop(gone)
        self.replay = _without(self.replay, {x.key for x in gone})
        self.turns = turns.chosen(np.flatnonzero(~is_old), (), 0)
        self.num_stale += len(gone)
        return len(gone)

    def clear(self) -> int:
        """Drop all samples, whose rows are of no more use, and count from the beginning. Returns
        how many they were."""
        held = [*_all(self.replay), *_all(self.judges)]
        self.store.drop(held)
        self.replay, self.judges, self.turns = Replay(), Replay(), Turns()
        self.num_samples = self.num_held_out = self.fresh_rows = self.trained_rows = 0
        self.held_back = None
        return len(held)

    def _keep(self, training: Sequence[Sample], judges: Sequence[Sample]) -> None:
        """Take in what the replay mix keeps."""
        if self.store.num_free > _ROOMY * self.store.num_pages:
            self.room = min(1.0, self.room / _SHRINK)
        num_held, num_judges = len(self.turns.samples), len(_all(self.judges))
        places = self._mixed(
            _places_of(self.replay),
            range(num_held, num_held + len(training)),
            _places_of(self.judges),
            range(num_judges, num_judges + len(judges)),
        )
        self._hold(*places, training, judges)
        self.held_back = None

    def _hold(
        self,
        replay: Replay[int],
        held_out: Replay[int],
        training: Sequence[Sample],
        judges: Sequence[Sample],
    ) -> None:
        """Hold these mixes instead of the present ones; fewer traces of them if not all fit.

        Args:
            replay: places in ``samples()`` and ``training`` behind them.
            held_out: the same in the samples that judge and in ``judges``.
        """
        held = _all(self.judges)
        pages = np.concatenate((self.turns.num_pages, _pages_of(training)))
        judging_pages = _pages_of((*held, *judges))
        while True:
            taught = _Mix.of(replay, pages, [*self.turns.samples, *training], len(training))
            judging = _Mix.of(held_out, judging_pages, [*held, *judges], len(judges))
            if self._fits(taught, judging):
                break
            self.room *= _SHRINK
            replay, held_out = self._mixed(replay, (), held_out, ())
        for mix in (taught, judging):
            self.store.drop(mix.samples[place] for place in mix.leaving)
        new = [(mix, place) for mix in (taught, judging) for place in mix.arriving]
        uploaded = self.store.put([mix.samples[place] for mix, place in new])
        for (mix, place), sample in zip(new, uploaded, strict=True):
            mix.samples[place] = sample
        num_held = len(self.turns.samples)
        self.turns = self.turns.chosen(
            taught.places, taught.samples[num_held:], arrived=self.num_samples
        )
        self.replay, self.judges = _taken(replay, taught), _taken(held_out, judging)

    def _mixed(
        self,
        replay: Replay[int],
        training: Sequence[int],
        held_out: Replay[int],
        judges: Sequence[int],
    ) -> tuple[Replay[int], Replay[int]]:
        """Both mixes with new samples, within the numbers of traces that fit."""
        s = self.settings
        recent, reservoir = (int(n * self.room) for n in (s.recent_traces, s.reservoir_traces))
        judging = max(1, int(s.held_out_traces * self.room))
        return (
            add(
                replay,
                training,
                recent_traces=max(1, recent),
                reservoir_traces=reservoir,
                seed=self.seed,
            ),
            add(
                held_out,
                judges,
                recent_traces=judging,
                reservoir_traces=judging,
                seed=self.seed,
            ),
        )

    def _fits(self, *mixes: _Mix) -> bool:
        """
        Raises:
            ValueError: they do not, and fewer traces would not help.
        """
        num = sum(len(mix.places) for mix in mixes)
        pages = sum(mix.num_pages for mix in mixes)
        if not num or pages < self.store.num_pages:  # page 0 holds nothing
            return True
        if num <= 3:
            raise ValueError(
                f"{num} traces take {pages} pages of hidden rows and the store has "
                f"{self.store.num_pages}; raise trainer.memory_fraction, or trainer.memory_bytes "
                f"on a CPU"
            )
        return False

    @property
    def held_out(self) -> tuple[HeldSample, ...]:
        """Newest held-out samples, oldest first."""
        return self.judges.recent

    @property
    def held_out_older(self) -> tuple[HeldSample, ...]:
        """Uniform sample of the held-out samples before ``held_out``."""
        return self.judges.reservoir

    def samples(self) -> tuple[HeldSample, ...]:
        """All training samples held."""
        return (*self.replay.recent, *self.replay.reservoir)

    def waits_for(self) -> str | None:
        """What the next update waits for; ``None`` if it can start."""
        s = self.settings
        if self.num_samples < s.min_traces:
            return f"traces: {self.num_samples} of trainer.min_traces={s.min_traces}"
        if not self.turns.samples:  # all were deleted, or none was found again after a restart
            return "traces: none is held any more"
        if self.trained_rows + s.batch_tokens > s.replay_ratio * self.fresh_rows:
            seen = self.trained_rows / self.fresh_rows
            return (
                f"fresh traces: {self.fresh_rows} rows were seen {seen:.2f} times, "
                f"trainer.replay_ratio={s.replay_ratio:g}"
            )
        return self.held_back

    def draw(self, random: np.random.Generator) -> Drawn:
        """Draw the pieces of the next batch, up to ``batch_tokens`` positions, and count the
        visits.

        ``trainer.draw`` names the rule that decides which samples are taken; one piece of each, any
        of them. Empty if the caps on tenants and domains leave no batch; ``waits_for`` then says
        so until more samples arrive.
        """
        s = self.settings
        rule = draw_rule(s.draw)
        if s.max_tenant_share is None and s.max_domain_share is None:
            most = self.turns.most_within(s.batch_tokens)
            return self._until_full(rule(self._pool(most), s, random), random)
        for _ in range(_TRIES):
            parts = self._within_caps(rule(self._pool(), s, random), random)
            if parts:
                return parts
        self.held_back = self._why_no_batch()
        return []

    def _pool(self, num_wanted: int | None = None) -> Pool:
        turns = self.turns
        return Pool(
            age_N=self.num_samples - 1 - turns.arrived,
            visits_N=turns.visits,
            num_pieces_N=turns.num_pieces,
            is_recent_N=np.arange(len(turns.samples)) < len(self.replay.recent),
            num_older=self.replay.num_left,
            tenant_N=turns.tenants,
            domain_N=turns.domains,
            surprise_N=turns.surprise,
            num_wanted=num_wanted,
        )

    def _until_full(self, places: Places, random: np.random.Generator) -> Drawn:
        parts: Drawn = []
        num_tokens = 0
        for place in places:
            sample = self.turns.samples[place]
            piece = sample.pieces[int(random.integers(len(sample.pieces)))]
            num_tokens += len(piece.slots)
            if parts and num_tokens > self.settings.batch_tokens:
                break
            parts.append((sample, piece))
            self.turns.visits[place] += 1
        return parts

    def _within_caps(self, places: Places, random: np.random.Generator) -> Drawn:
        """As ``_until_full``, but no tenant or domain gets more than its share of the rows."""
        turns, s = self.turns, self.settings
        first = (turns.num_pieces.cumsum() - turns.num_pieces)[places]
        chosen = first + random.integers(turns.num_pieces[places])
        num_rows, num_tokens = turns.sizes[:, chosen]
        bounds = (turns.tenants, s.max_tenant_share), (turns.domains, s.max_domain_share)
        caps = [Cap(strata[places], share) for strata, share in bounds if share is not None]
        rows = rows_within(num_rows, num_tokens, s.batch_tokens, caps)
        taken = np.flatnonzero(rows)
        turns.visits[places[taken]] += 1
        return [
            (turns.samples[places[at]], _shortened(turns.pieces[chosen[at]], int(rows[at]), random))
            for at in taken.tolist()
        ]

    def _why_no_batch(self) -> str:
        turns, s = self.turns, self.settings
        shares = {"tenant": s.max_tenant_share, "domain": s.max_domain_share}
        strata = {"tenant": turns.tenants, "domain": turns.domains}
        found = "; ".join(
            f"{len(np.unique(strata[name]))} {name}s of the {strata_needed(share)} or more that "
            f"trainer.max_{name}_share={share:g} needs"
            for name, share in shares.items()
            if share is not None
        )
        return f"traces of more tenants or domains: {found}"

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint. Samples are saved by key; the trace log still holds them."""
        return {
            "recent": [x.key for x in self.replay.recent],
            "reservoir": [x.key for x in self.replay.reservoir],
            "num_left": self.replay.num_left,
            "held_out": [x.key for x in self.judges.recent],
            "held_out_older": [x.key for x in self.judges.reservoir],
            "held_out_left": self.judges.num_left,
            "visits": self.turns.by_key(),
            "arrivals": self.turns.arrivals(),
            "held_back": self.held_back,
            "room": self.room,
            "num_samples": self.num_samples,
            "num_held_out": self.num_held_out,
            "fresh_rows": self.fresh_rows,
            "trained_rows": self.trained_rows,
        }

    def restore(self, stored: dict[str, Any], found: dict[str, Sample]) -> None:
        """Become what ``to_json`` described, without the samples that are no longer in the log.

        Args:
            stored: from ``to_json``.
            found: samples by key.

        Raises:
            KeyError: ``stored`` is incomplete.
            ValueError: not a single sample fits into the store.
        """

        training, replay = _found(stored, ("recent", "reservoir", "num_left"), found)
        names = ("held_out", "held_out_older", "held_out_left")
        judges, held_out = _found(stored, names, found)
        self.store.drop([*_all(self.replay), *_all(self.judges)])
        self.room = stored["room"]
        self.replay, self.judges, self.turns = Replay(), Replay(), Turns()
        if found:
            self.store.prepare(next(iter(found.values())))
        self._hold(replay, held_out, training, judges)
        # Earlier checkpoints lack the next two; samples of unknown arrival count as the oldest.
        arrived = stored.get("arrivals", {})
        self.held_back = stored.get("held_back")
        self.turns = Turns.of(self.samples(), stored["visits"], arrived)
        self.num_samples = stored["num_samples"]
        self.num_held_out = stored.get("num_held_out", 0)  # checkpoints from before lack it
        self.fresh_rows = stored["fresh_rows"]
        self.trained_rows = stored["trained_rows"]


def keys_in(stored: dict[str, Any]) -> set[str]:
    """Keys of all samples that ``Memory.restore`` needs."""
    names = ("recent", "reservoir", "held_out", "held_out_older")
    return {key for name in names for key in stored[name]}


def _all(replay: Replay[Any]) -> tuple[Any, ...]:
    return (*replay.recent, *replay.reservoir)


def _without(replay: Replay[HeldSample], keys: set[str]) -> Replay[HeldSample]:
    recent, reservoir = (
        tuple(x for x in part if x.key not in keys) for part in (replay.recent, replay.reservoir)
    )
    return Replay(recent, reservoir, replay.num_left)


def _places_of(replay: Replay[Any]) -> Replay[int]:
    """The mix of the places in ``_all(replay)``."""
    num_recent, num = len(replay.recent), len(replay.recent) + len(replay.reservoir)
    return Replay((*range(num_recent),), (*range(num_recent, num),), replay.num_left)


def _taken(replay: Replay[int], mix: _Mix) -> Replay[HeldSample]:
    """The mix of the samples at these places."""
    recent, reservoir = (
        tuple(map(mix.samples.__getitem__, part)) for part in (replay.recent, replay.reservoir)
    )
    return Replay(recent, reservoir, replay.num_left)


@dataclass(frozen=True, slots=True)
class _Mix:
    """Which samples are to be held, of those that are and of new ones behind them."""

    places: npt.NDArray[np.int64]
    samples: list[Any]
    num_pages: int
    """Of those to be held."""
    leaving: list[int]
    """Places of held ones that are not to be held any more."""
    arriving: list[int]
    """Places of new ones that are to be held."""

    @classmethod
    def of(
        cls, replay: Replay[int], pages: npt.NDArray[np.int64], samples: list[Any], num_new: int
    ) -> _Mix:
        """
        Args:
            pages: of each sample.
            num_new: how many of the samples are new.
        """
        places = np.array(_all(replay), dtype=np.int64)
        num_held = len(samples) - num_new
        leaves = np.ones(len(samples), dtype=np.bool_)
        leaves[places] = False
        return cls(
            places,
            samples,
            int(pages[places].sum()),
            np.flatnonzero(leaves[:num_held]).tolist(),
            places[places >= num_held].tolist(),
        )


def _pages_of(samples: Sequence[HeldSample | Sample]) -> npt.NDArray[np.int64]:
    return np.array([num_pages_of(one) for one in samples], dtype=np.int64)


def _found(
    stored: dict[str, Any], names: tuple[str, str, str], found: dict[str, Sample]
) -> tuple[tuple[Sample, ...], Replay[int]]:
    """The samples of a stored mix that are there, and the mix of their places."""
    recent, reservoir = (
        tuple(found[key] for key in stored[name] if key in found) for name in names[:2]
    )
    return (*recent, *reservoir), _places_of(Replay(recent, reservoir, stored[names[2]]))


def _shortened(piece: HeldPiece, num_rows: int, random: np.random.Generator) -> HeldPiece:
    """A part of the piece with so many consecutive rows, behind as much context."""
    left_out = len(piece.rows) - num_rows
    if not left_out:
        return piece
    start = int(random.integers(left_out + 1))
    rows = piece.rows[start : start + num_rows]
    first = rows[0] - piece.rows[0]
    return HeldPiece(piece.slots[first : rows[-1] + 2], rows - first)
