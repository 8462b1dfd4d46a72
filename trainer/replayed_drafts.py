"""What longer drafts would have kept: the drafter, replayed along the target's text.

A round that decoded plainly, or whose whole draft was kept, does not say what a longer draft would
have brought. The trace does: its hidden rows are what the drafter drafts from, and its text is what
the target wrote there. So the version in use drafts again, K tokens along the text, and
``drafters.kept`` says how likely verification is to keep each of them, given the text. The first v
of them are the ones that were kept, so the others continue the very draft that ran; v is 0 for a
plain round.

Nothing of the target is computed but its lm_head. Rounds of versions that are no longer stored, of
drafters that do not learn, at the ends of texts and without captured rows are not replayed.

Shapes: R rows with a loss, K draft positions.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import nn

from buffer.backends import open_backend
from buffer.bundles import BundleError
from buffer.manifest import TENSORS
from buffer.records import Round, Trace
from buffer.signed_weights import open_weights
from configs.schema import Settings
from drafters.samples import Sample
from drafters.several import line_of
from drafters.trainable import learning_kinds, trainable
from targets.device import pick_device
from targets.head import TargetHead, load_target_head
from trainer.build import expected_of
from trainer.dataset import Expected, Refusal, sample_of
from trainer.packing import pack
from trainer.rows import PAGE, RowStore, pages_of
from trainer.run_target import target_of_run
from trainer.update import batch_dtype

log = logging.getLogger(__name__)

Place = tuple[str, int, int, int]
"""Producer, epoch and number of a trace, and the anchor of a round."""

_TOKENS_AT_ONCE = 8192
"""Positions that are computed at once, unless a single trace has more."""
_FACT_BYTES = 64
"""Upper bound of what the store keeps of a position beside its rows."""


@dataclass(slots=True)
class ReplayedDrafts:
    """Result of a replay."""

    chances: dict[Place, tuple[float, ...]] = field(default_factory=dict)
    """[K] of each round that was replayed, see ``policies.logged.LoggedRow.replayed``."""
    num_open: int = 0
    """Rounds that do not say what a longer draft would have kept."""

    def to_line(self) -> str:
        """For the terminal."""
        return (
            f"{len(self.chances)} of {self.num_open} rounds that do not say what a longer draft "
            f"keeps were replayed along the text; the others follow the hazards of the log"
        )


def replayed_drafts(
    settings: Settings, kind: str, traces: Sequence[Trace], versions: range
) -> ReplayedDrafts:
    """Replay the rounds of some versions of a drafter that do not say what longer drafts keep.

    Args:
        kind: of the drafter; nothing is replayed of one that does not learn.
        versions: rounds of others are left out.

    Raises:
        ValueError, OSError: the target or the stored versions cannot be read.
    """
    found = ReplayedDrafts()
    wanted: dict[int, list[Trace]] = defaultdict(list)
    if kind not in learning_kinds():
        return found
    kinds = (kind, "none") if not line_of(settings, kind) else (kind,)
    for trace in traces:
        own = list(_open(trace, kinds))
        found.num_open += sum(one.version in versions for one in own)
        for version in {one.version for one in own if one.version in versions}:
            wanted[version].append(trace)
    if not wanted:
        return found
    device = pick_device(settings.trainer.device, setting="trainer.device")
    place = target_of_run(settings)
    known = {trace.target_fingerprint for own_traces in wanted.values() for trace in own_traces}
    if place.fingerprint not in known:
        raise ValueError(
            f"the traces are of target {min(known)[:12]}, and the settings name "
            f"{place.fingerprint[:12]}; name the run's own with --set target=..."
        )
    head = load_target_head(place.folder, device, batch_dtype(device))
    store = open_weights(
        open_backend(settings.buffer.url, settings.run_dir),
        settings.swap.public_key,
        line=line_of(settings, kind),
    )
    for version, own_traces in sorted(wanted.items()):
        try:
            bundle = store.read(version)
        except BundleError as error:
            log.warning("version %d is not replayed: %s", version, error)
            continue
        model = trainable(kind).load_model(
            bundle.manifest.drafter_config, load(bundle.files[TENSORS])
        )
        replay = _Replay(settings, kinds, version, model.to(device), head)
        # The lm_head at hand says nothing of traces of other weights, whatever the version's are.
        expected = replace(expected_of(bundle.manifest, head), target_fingerprint=place.fingerprint)
        for group in _groups(own_traces, expected, settings.trainer.max_sequence):
            found.chances.update(replay.of(group))
    return found


def _open(trace: Trace, kinds: tuple[str, ...]) -> Iterator[Round]:
    """Rounds of a drafter that do not say what a longer draft would have kept.

    Args:
        kinds: the drafter's, and ``none`` if the version of plain rounds is its own.
    """
    for one in trace.rounds:
        if one.drafter in kinds and one.num_accepted == len(one.draft_ids) >= one.draft_k:
            yield one


def _groups(
    traces: Sequence[Trace], expected: Expected, max_sequence: int
) -> Iterator[list[tuple[Trace, Sample]]]:
    """Traces that can be replayed, as many as are computed at once."""
    group: list[tuple[Trace, Sample]] = []
    num = 0
    for trace in traces:
        sample = sample_of(trace, expected, max_sequence)
        if isinstance(sample, Refusal):
            continue
        length = sum(piece.stop - piece.start for piece in sample.pieces)
        if group and num + length > _TOKENS_AT_ONCE:
            yield group
            group, num = [], 0
        group.append((trace, sample))
        num += length
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class _Replay:
    """One version of a drafter."""

    settings: Settings
    kinds: tuple[str, ...]
    """Of the drafter, and see ``_open``."""
    version: int
    model: nn.Module
    head: TargetHead

    @torch.no_grad()
    def of(self, group: Sequence[tuple[Trace, Sample]]) -> Mapping[Place, tuple[float, ...]]:
        """Chances of the rounds of some traces."""
        samples = [sample for _, sample in group]
        device = next(self.model.parameters()).device
        store = _store_for(samples, device)
        held = store.put(samples)
        places = np.repeat(np.arange(len(held)), [len(one.pieces) for one in held])
        packed = pack([piece for one in held for piece in one.pieces], None)
        batch = store.batch(packed, batch_dtype(device))
        learns: Any = trainable(self.kinds[0])
        chains = learns.acceptance(
            self.model, self.head, batch, self.settings.drafter.max_draft,
            block=self.settings.engine.verification == "block",
        )  # fmt: skip
        kept = chains.kept_RK.cpu().tolist()
        is_full = chains.is_full_R.cpu().tolist()
        anchors = batch.positions_T[batch.row_R].cpu().tolist()
        owners = places[packed.segment_T[packed.row_R]].tolist()
        row_of = {
            (owner, anchor): row
            for row, (owner, anchor) in enumerate(zip(owners, anchors, strict=True))
            if is_full[row]
        }
        found = {}
        for number, (trace, _) in enumerate(group):
            for one in _open(trace, self.kinds):
                row = row_of.get((number, one.anchor))
                if row is not None and one.version == self.version:
                    place = trace.producer, trace.epoch, trace.seq, one.anchor
                    found[place] = tuple(kept[row])
        return found


def _store_for(samples: Sequence[Sample], device: torch.device) -> RowStore:
    """Memory for these alone."""
    row = samples[0].rows[0]
    slot_bytes = row.numel() * max(one.rows.element_size() for one in samples) + _FACT_BYTES
    slot_bytes += 4 * len(row)
    num_pages = sum(map(pages_of, samples)) + 2
    return RowStore(device, num_pages * PAGE * slot_bytes)
