"""Captured rows in the memory of the trainer's device, each of them uploaded once.

Memory is divided into pages of ``PAGE`` slots. A sample takes as many pages as its rows need,
anywhere, and gives them back when the replay mix drops it; batches are gathered by slot. Rows stay
as they were captured: bfloat16, or fp8 with scales.

Shapes: C slots, T positions of a batch, R rows with a loss, m tapped layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buffer.deletions import Owner
from configs.schema import TrainerSettings
from drafters.batch import TrainingBatch
from drafters.samples import Sample, rows_with_loss, widen
from specops.capture_pack import quantise
from trainer.packing import HeldPiece, Ints, Packed

PAGE = 16
_NUM_FACTS = 6
"""int32 columns of a slot: token id, position, known, the bits of temperature and weight, and
whether drafts are kept by match."""
_NUM_OUTCOMES = 3
"""Further columns, if they are asked for: see ``TrainingBatch.outcome_R3``."""


@dataclass(frozen=True, slots=True)
class HeldSample:
    """A sample whose rows are in the store."""

    key: str
    pieces: tuple[HeldPiece, ...]
    pages: tuple[int, ...]
    num_loss_rows: int
    version: int | None
    """See ``Sample``."""
    domain: str
    surprise: float | None
    owner: Owner | None = None
    """Likewise."""
    temperature: float = 0.0
    """Of the request."""

    @property
    def tenant(self) -> str:
        """Whose trace it is; empty if nobody's."""
        return "" if self.owner is None else self.owner.tenant


class Columns(NamedTuple):
    """The store's tensors."""

    rows_CmH: Tensor
    """[C, m + 1, H]; fp8 as uint8, because few operations know fp8."""
    scale_Cm: Tensor | None
    """[C, m + 1] float32 multiplier of fp8 rows."""
    facts_C: Tensor
    """[C, 6] int32, or more; see ``_NUM_FACTS``."""
    dtype: torch.dtype
    """Of the rows."""


class BatchIndex(NamedTuple):
    """``Packed`` on the device; int32, but ``num_rows``."""

    slots_T: Tensor
    segment_T: Tensor
    row_R: Tensor
    num_rows: Tensor
    """[1]."""


def memory_bytes(settings: TrainerSettings, device: torch.device) -> int:
    """Bytes that the store may take on this device."""
    if device.type != "cuda":
        return settings.memory_bytes
    total: int = torch.cuda.get_device_properties(device).total_memory
    return int(total * settings.memory_fraction)


class RowStore:
    """Bounded store of samples. Its tensors are allocated for the first sample and never move."""

    def __init__(self, device: torch.device, num_bytes: int, *, has_outcomes: bool = False) -> None:
        """
        Args:
            num_bytes: upper bound of all tensors together.
            has_outcomes: keep what became of draft tokens.
        """
        self._num_facts = _NUM_FACTS + _NUM_OUTCOMES * has_outcomes
        self.device = device
        self.num_bytes = num_bytes
        self.num_pages = 0
        """Pages in all; 0 before the first sample."""
        self._free: list[int] = []
        self._columns: Columns | None = None

    @property
    def num_free(self) -> int:
        """Free pages."""
        return len(self._free)

    def prepare(self, sample: Sample) -> None:
        """Allocate memory for samples like this one, unless that was done.

        Raises:
            ValueError: not even two pages fit into ``num_bytes``.
        """
        width, hidden = sample.rows.shape[1:]
        self.allocate(width, hidden, sample.rows.dtype)

    def allocate(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        """Allocate memory for rows of this form, unless that was done. Rows of another dtype are
        converted when they come.

        Args:
            width: m + 1, tapped layers and the lm_head's input.

        Raises:
            ValueError: not even two pages fit into ``num_bytes``.
        """
        if self._columns is not None:
            return
        is_fp8 = dtype == torch.float8_e4m3fn
        slot_bytes = width * hidden * dtype.itemsize + 4 * self._num_facts
        slot_bytes += 4 * width if is_fp8 else 0
        self.num_pages = self.num_bytes // (slot_bytes * PAGE)
        if self.num_pages < 2:
            raise ValueError(
                f"{self.num_bytes} bytes hold no rows of {slot_bytes} bytes; raise "
                f"trainer.memory_fraction, or trainer.memory_bytes on a CPU"
            )
        slots, where = self.num_pages * PAGE, self.device
        stored = torch.uint8 if is_fp8 else dtype
        self._columns = Columns(
            torch.empty((slots, width, hidden), dtype=stored, device=where),
            torch.empty((slots, width), device=where) if is_fp8 else None,
            torch.empty((slots, self._num_facts), dtype=torch.int32, device=where),
            dtype,
        )
        for column in self._columns[:3]:
            if isinstance(column, Tensor):
                column[:PAGE].zero_()  # page 0 is what padding reads
        self._free = list(range(self.num_pages - 1, 0, -1))

    def put(self, samples: Sequence[Sample]) -> list[HeldSample]:
        """Upload samples, all in one copy for each column.

        Raises:
            ValueError: they do not fit. Ask ``pages_of`` and ``num_free`` first.
        """
        if not samples:
            return []
        self.prepare(samples[0])
        wanted = sum(pages_of(sample) for sample in samples)
        if wanted > self.num_free:
            raise ValueError(f"{wanted} pages do not fit {self.num_free} free ones")
        pages = [[self._free.pop() for _ in range(pages_of(sample))] for sample in samples]
        slots = [_slots_of(own) for own in pages]
        self._write(samples, slots)
        return [
            _held(*each) for each in zip(samples, slots, (tuple(own) for own in pages), strict=True)
        ]

    def drop(self, samples: Iterable[HeldSample]) -> None:
        """Give back the pages of samples."""
        self._free.extend(page for sample in samples for page in sample.pages)

    def wipe(self, samples: Sequence[HeldSample]) -> None:
        """Overwrite the rows and token ids of samples with zeros. Their pages stay theirs."""
        pages = [page for sample in samples for page in sample.pages]
        if self._columns is None or not pages:
            return
        slots = self._to_device(torch.from_numpy(_slots_of(pages)).long())
        for column in self._columns[:3]:
            if isinstance(column, Tensor):
                column.index_fill_(0, slots, 0)

    def gather(self, index: BatchIndex, longest: int, dtype: torch.dtype) -> TrainingBatch:
        """The batch at some slots, its rows in ``dtype``. Nothing waits for the device."""
        columns = self._columns
        assert columns is not None, "there is a sample before there is a batch"
        slots = index.slots_T.long()
        facts = columns.facts_C[slots]
        known_T = facts[:, 2] != 0
        rows = columns.rows_CmH[slots]
        if columns.scale_Cm is not None:
            rows = widen(rows.view(columns.dtype), columns.scale_Cm[slots])
        rows = rows.to(dtype).masked_fill_(~known_T[:, None, None], 0)
        row_R = index.row_R.long()
        at_row = facts[row_R]
        return TrainingBatch(
            token_ids_T=facts[:, 0].long(),
            positions_T=facts[:, 1].long(),
            segment_T=index.segment_T.long(),
            features_TF=rows[:, :-1].flatten(1),
            known_T=known_T,
            row_R=row_R,
            is_row_R=torch.arange(len(row_R), device=row_R.device) < index.num_rows,
            last_hidden_RH=rows[row_R, -1],
            temperature_R=at_row[:, 3].contiguous().view(torch.float32),
            by_match_R=at_row[:, 5] != 0,
            weight_R=at_row[:, 4].contiguous().view(torch.float32),
            longest=longest,
            outcome_R3=at_row[:, _NUM_FACTS:] if self._num_facts > _NUM_FACTS else None,
        )

    def batch(self, packed: Packed, dtype: torch.dtype) -> TrainingBatch:
        """``gather`` of index columns that are still on the host."""
        columns = self._to_device(torch.from_numpy(packed.columns()))
        return self.gather(index_of(columns, len(packed.slots_T)), packed.longest, dtype)

    def _write(self, samples: Sequence[Sample], slots: Sequence[Ints]) -> None:
        columns = self._columns
        assert columns is not None
        stored = [_as_stored(sample, columns) for sample in samples]
        captured = [_captured(sample) for sample in samples]
        at = [
            own[sample.positions_N.numpy()[keep] - first_position(sample)]
            for sample, own, keep in zip(samples, slots, captured, strict=True)
        ]
        where = self._to_device(torch.from_numpy(np.concatenate(at)).long())
        bits = [
            rows[keep].view(columns.rows_CmH.dtype)
            for (rows, _), keep in zip(stored, captured, strict=True)
        ]
        columns.rows_CmH.index_copy_(0, where, self._joined(bits))
        if columns.scale_Cm is not None:
            scales = [
                s[keep] for (_, s), keep in zip(stored, captured, strict=True) if s is not None
            ]
            columns.scale_Cm.index_copy_(0, where, self._joined(scales))
        facts = np.concatenate([_facts_of(sample, self._num_facts) for sample in samples])
        places = [own[: _num_positions(sample)] for sample, own in zip(samples, slots, strict=True)]
        everywhere = self._to_device(torch.from_numpy(np.concatenate(places)).long())
        columns.facts_C.index_copy_(0, everywhere, self._to_device(torch.from_numpy(facts)))

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts behind each other on the device, by way of one copy in pinned memory."""
        if self.device.type != "cuda":
            return torch.cat(list(parts)).to(self.device)
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        pinned = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)
        torch.cat(list(parts), out=pinned)
        return pinned.to(self.device, non_blocking=True)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def index_of(columns: Tensor, num_positions: int) -> BatchIndex:
    """The parts of ``Packed.columns`` on a device.

    Args:
        columns: [2 T + R + 1] int32.
        num_positions: T.
    """
    slots, segment, rows = (
        columns[:num_positions],
        columns[num_positions : 2 * num_positions],
        columns[2 * num_positions : -1],
    )
    return BatchIndex(slots, segment, rows, columns[-1:])


def first_position(sample: Sample) -> int:
    """First position that a piece of the sample reads; what is before it is not stored."""
    return min(piece.start for piece in sample.pieces)


def pages_of(sample: Sample) -> int:
    """Pages that a sample takes."""
    return -(-_num_positions(sample) // PAGE)


def _num_positions(sample: Sample) -> int:
    return max(piece.stop for piece in sample.pieces) - first_position(sample)


def _slots_of(pages: Sequence[int]) -> Ints:
    """Slots of the pages, in order."""
    starts = np.array(pages, dtype=np.int32)[:, None] * PAGE
    return (starts + np.arange(PAGE, dtype=np.int32)).reshape(-1).astype(np.int32)


def _captured(sample: Sample) -> slice:
    """Captured rows, of all N, that a piece reads."""
    first = first_position(sample)
    bounds = sample.positions_N.numpy().searchsorted((first, first + _num_positions(sample)))
    return slice(*bounds.tolist())


def _as_stored(sample: Sample, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """Rows and scales in the form of the store; it has the form of the first sample."""
    if sample.rows.dtype == columns.dtype:
        return sample.rows, sample.scale
    wide = widen(sample.rows, sample.scale)
    if columns.scale_Cm is not None:
        return quantise(wide)
    return wide.to(columns.dtype), None


# In what follows numpy, not torch: each of torch's operations gives up the interpreter's lock, and
# while the thread that reads traces works, it is had back after milliseconds.


def _facts_of(sample: Sample, num_facts: int) -> Ints:
    """[T, num_facts] int32 of the positions that are stored."""
    first, num = first_position(sample), _num_positions(sample)
    at = slice(first, first + num)
    facts = np.zeros((num, num_facts), dtype=np.int32)
    facts[:, 0] = sample.token_ids_T.numpy()[at]
    facts[:, 1] = np.arange(first, first + num)
    facts[:, 2] = _known(sample)
    reals = facts[:, 3:5].view(np.float32)
    reals[:, 0] = sample.temperature
    reals[:, 1] = 1.0 if sample.weight_T is None else sample.weight_T.numpy()[at]
    facts[:, 5] = sample.sampling.is_decided
    if num_facts > _NUM_FACTS:
        assert sample.outcome_T3 is not None, "whoever keeps outcomes asks for them"
        facts[:, _NUM_FACTS:] = sample.outcome_T3.numpy()[at]
    return facts


def _known(sample: Sample) -> npt.NDArray[np.bool_]:
    """[T] of the positions that are stored: the row was captured."""
    known = np.zeros(_num_positions(sample), dtype=np.bool_)
    known[sample.positions_N.numpy()[_captured(sample)] - first_position(sample)] = True
    return known


def _held(sample: Sample, slots: Ints, pages: tuple[int, ...]) -> HeldSample:
    first, known = first_position(sample), _known(sample)
    pieces = tuple(
        HeldPiece(
            slots[piece.start - first : piece.stop - first],
            rows_with_loss(known[piece.start - first : piece.stop - first], piece),
        )
        for piece in sample.pieces
    )
    return HeldSample(
        sample.key,
        pieces,
        pages,
        sample.num_loss_rows,
        sample.version,
        sample.domain,
        sample.surprise,
        sample.owner,
        sample.temperature,
    )
