"""Figures of updates, read from the device some updates later so that no update waits for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAG = 8
"""Updates between two reads on a GPU: each update's figures arrive 8 to 16 updates later."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What the host knows of an update when it launches it."""

    step: int
    """Number of the update, from 1."""
    num_rows: int
    """Rows with a loss."""
    lr: float


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Figures of one update."""

    step: int
    loss: float
    alpha: list[float]
    """Mean overlap at each draft position on the batch, before the update."""
    agree: list[float]
    """Share of positions where the drafter's argmax was the committed token."""
    num_rows: int
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    """Loss or gradient was not finite, so the weights were left unchanged."""


class Figures:
    """The figures of the newest updates in device memory, and those on their way to the host."""

    def __init__(self, device: torch.device, num_steps: int, lag: int | None = None) -> None:
        """
        Args:
            num_steps: K, values of ``alpha`` and ``agree``.
            lag: updates between two reads; ``None``: ``LAG`` on a GPU, 1 on a CPU.
        """
        is_gpu = device.type == "cuda"
        self.lag = lag or (LAG if is_gpu else 1)
        shape = (self.lag, 3 + 2 * num_steps)
        self._ring = torch.zeros(shape, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._host = torch.zeros(shape, pin_memory=is_gpu)
        self._event = torch.cuda.Event() if is_gpu else None  # type: ignore[no-untyped-call]
        self._num_written = 0
        self._launched: list[tuple[int, Launched]] = []
        """Place in the ring and update, for figures that are there only."""
        self._copied: list[tuple[int, Launched]] = []
        """The same for figures on their way to ``_host``."""

    def write(
        self, loss: Tensor, grad_norm: Tensor, skipped: Tensor, alpha_K: Tensor, agree_K: Tensor
    ) -> None:
        """Write an update's figures; runs on the device and can be captured."""
        first = torch.stack((loss.detach().float(), grad_norm.float(), skipped.float()))
        row = torch.cat((first, alpha_K.float(), agree_K.float()))
        self._ring.index_copy_(0, self._place, row[None])
        self._place.add_(1).remainder_(self.lag)

    def rewind(self) -> None:
        """Forget what ``write`` wrote without an update that counts."""
        self._place.zero_()

    def launched(self, update: Launched) -> list[UpdateReport]:
        """Count an update whose ``write`` was launched; returns the reports that are ready."""
        self._launched.append((self._num_written % self.lag, update))
        self._num_written += 1
        if len(self._launched) < self.lag:
            return []
        reports = self._arrived()
        self._copy()
        return reports if self._event is not None else reports + self._arrived()

    def settle(self) -> list[UpdateReport]:
        """Wait for all updates; returns the reports that were not returned yet."""
        reports = self._arrived()
        self._copy()
        return reports + self._arrived()

    def forget(self) -> None:
        """Drop reports that were not returned yet."""
        self._launched, self._copied = [], []

    def _copy(self) -> None:
        self._host.copy_(self._ring, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._copied, self._launched = self._launched, []

    def _arrived(self) -> list[UpdateReport]:
        if not self._copied:
            return []
        if self._event is not None:
            self._event.synchronize()
        rows = self._host.tolist()
        reports = [_report(update, rows[place]) for place, update in self._copied]
        self._copied = []
        return reports


def _report(update: Launched, row: list[float]) -> UpdateReport:
    num_steps = (len(row) - 3) // 2
    return UpdateReport(
        step=update.step,
        loss=row[0],
        alpha=row[3 : 3 + num_steps],
        agree=row[3 + num_steps :],
        num_rows=update.num_rows,
        grad_norm=row[1],
        lr=update.lr,
        skipped=row[2] != 0,
    )
