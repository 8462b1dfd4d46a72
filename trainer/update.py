"""One update as a program of the device: gather, loss, backward, clip, optimizer and averaging.

Nothing in it waits for the device or depends on a value of a tensor, so on a GPU it is captured in
a CUDA graph, one for each number of rows with a loss. On a CPU the same functions run at once.

An update whose loss or gradient is not finite changes neither the weights nor their moments nor
their average; the device decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import Trainable
from targets.head import TargetHead
from trainer.figures import Figures
from trainer.group import Group
from trainer.optimizers import Elsewhere, Optimizer, new_optimizer
from trainer.packing import Ints, Packed
from trainer.rows import RowStore, index_of

_IN_FLIGHT = 4
"""Updates that the host may be ahead of the device: each has a staging buffer of its own."""


def batch_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, where the drafter computes under autocast; its weights stay float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class Weights:
    """What updates change in place, at addresses that never move."""

    model: nn.Module
    average: nn.Module
    """Running average of the model's weights: the next candidate."""
    num_averaged: Tensor
    """float32 scalar: updates in the average."""
    optimizer: Optimizer
    lr: Tensor
    """float32 scalar that the optimizer reads."""


def new_weights(
    trainable: Trainable[Any],
    model: nn.Module,
    average: nn.Module,
    settings: TrainerSettings,
    group: Group,
) -> Weights:
    """Weights with an optimizer whose moments are zero; if the processes of the group divide it,
    they make it themselves."""
    device = next(model.parameters()).device
    lr = torch.zeros((), device=device)
    if is_divided(settings, group):
        return Weights(model, average, torch.zeros((), device=device), Elsewhere(), lr)
    optimizer = new_optimizer(model, trainable.matrices(model), settings, lr)
    return Weights(model, average, torch.zeros((), device=device), optimizer, lr)


def is_divided(settings: TrainerSettings, group: Group) -> bool:
    """The processes divide the optimizer, and what else the stage of ZeRO says."""
    return group.size > 1 and settings.deepspeed.stage > 0


class UpdateProgram:
    """Launches updates."""

    def __init__(
        self,
        trainable: Trainable[Any],
        head: TargetHead,
        settings: TrainerSettings,
        weights: Weights,
        store: RowStore,
        figures: Figures,
        generator: torch.Generator,
        use_graphs: bool | None = None,
    ) -> None:
        """
        Args:
            use_graphs: ``None``: on a GPU.
        """
        device = store.device
        self.trainable, self.head, self.settings = trainable, head, settings
        self.weights, self.store, self.figures = weights, store, figures
        self.generator = generator
        self._use_graphs = device.type == "cuda" if use_graphs is None else use_graphs
        self._inbox: dict[int, Tensor] = {}
        """Number of columns -> the device memory that a graph reads them from."""
        self._staging = _Staging(device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        """(columns, positions) -> graph."""
        self._pool: Any = None
        self._is_trial = torch.zeros((), dtype=torch.bool, device=device)
        """On the device: an update changes nothing but its figures."""

    def capture_all(self, shapes: Iterable[Packed]) -> None:
        """Capture the updates of these shapes before the first batch, so that none is captured
        while a server shares the card: that would take seconds for each. Does nothing on a CPU."""
        if not self._use_graphs:
            return
        self._is_trial.fill_(True)
        for packed in shapes:
            self._first(self._upload(packed, 0.0), packed)
        self._is_trial.fill_(False)
        self.figures.rewind()

    def give_up_graphs(self) -> bool:
        """From now on compute updates as they are written; returns whether they were captured."""
        if not self._use_graphs:
            return False
        torch.cuda.synchronize(self.store.device)
        self._use_graphs = False
        self.weights.model.zero_grad(set_to_none=True)  # gradients are in the graphs' memory
        self._graphs.clear()
        self._inbox.clear()
        self._pool = None
        return True

    def launch(self, packed: Packed, lr: float) -> None:
        """Launch an update; on a GPU it has not happened yet when this returns."""
        columns = self._upload(packed, lr)
        key = (len(columns), len(packed.slots_T))
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        if not self._use_graphs:
            self._update(columns, packed)
            return
        self._first(columns, packed)

    def _first(self, columns: Tensor, packed: Packed) -> None:
        """Run the first update of its shape, which warms up what a capture must not: libraries and
        kernels. Then capture it."""
        side = torch.cuda.Stream(self.store.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._update(columns, packed)
        torch.cuda.current_stream().wait_stream(side)
        self._graphs[len(columns), len(packed.slots_T)] = self._capture(columns, packed)

    def _capture(self, columns: Tensor, packed: Packed) -> torch.cuda.CUDAGraph:
        """Record the update of one shape. A captured call changes nothing until it is replayed."""
        torch.cuda.synchronize(self.store.device)
        self.weights.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Only this thread: the reader's may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._update(columns, packed)
        self._pool = graph.pool()
        return graph

    def _upload(self, packed: Packed, lr: float) -> Tensor:
        """The index columns behind the bits of the learning rate, in the memory of their shape."""
        rate = np.array([lr], dtype=np.float32).view(np.int32)
        values: Ints = np.concatenate((rate, packed.columns()))
        inbox = self._inbox.get(len(values))
        if inbox is None:
            inbox = torch.empty(len(values), dtype=torch.int32, device=self.store.device)
            if self._use_graphs:
                self._inbox[len(values)] = inbox
        self._staging.copy(values, inbox)
        return inbox

    def _update(self, columns: Tensor, packed: Packed) -> None:
        """The update itself. Of ``packed`` only the shapes count."""
        weights = self.weights
        weights.lr.copy_(columns[:1].view(torch.float32)[0])
        index = index_of(columns[1:], len(packed.slots_T))
        batch = self.store.gather(index, packed.longest, batch_dtype(self.store.device))
        weights.model.zero_grad(set_to_none=True)
        computed = self.trainable.loss(
            weights.model, self.head, batch, self.settings, self.generator
        )
        loss = computed.loss.detach()
        computed.loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(weights.model.parameters(), self.settings.grad_clip)
        skipped = ~(torch.isfinite(loss) & torch.isfinite(norm)) | self._is_trial
        weights.optimizer.step(skipped)
        update_average(weights, skipped, self.settings.average_decay)
        self.figures.write(loss, norm, skipped, computed.alpha_K, computed.agree_K)


@torch.no_grad()
def update_average(weights: Weights, skipped: Tensor, decay: float) -> None:
    """Take the present weights into their average, unless the update was skipped.

    The first updates count more: after n of them the average keeps ``min(decay, (1 + n) / (10 +
    n))`` of itself. A constant decay would keep random initial weights in it for a long time.
    """
    n = weights.num_averaged
    share = 1 - torch.clamp_max((1 + n) / (10 + n), decay)
    pairs = zip(weights.average.parameters(), weights.model.parameters(), strict=True)
    for mean, now in pairs:
        mean.lerp_(torch.where(skipped, mean, now), share)  # weights of a skipped one may be NaN
    n.add_(1 - skipped.float())


class _Staging:
    """Pinned buffers, taken in turn, so that a copy to a GPU neither waits nor is overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0

    def copy(self, values: Ints, into: Tensor) -> None:
        """Copy ``values`` into as long a tensor on the device. Waits while the host is too far
        ahead."""
        if self.device.type != "cuda":
            into.copy_(torch.from_numpy(values))
            return
        if len(self._buffers) < _IN_FLIGHT:
            pinned = torch.empty(0, dtype=into.dtype, pin_memory=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._buffers.append((pinned, event))
        place = self._next % _IN_FLIGHT  # the newest one while their number grows
        self._next += 1
        pinned, event = self._buffers[place]
        event.synchronize()
        if len(pinned) < len(values):
            pinned = torch.empty(len(values), dtype=into.dtype, pin_memory=True)
            self._buffers[place] = (pinned, event)
        pinned.numpy()[: len(values)] = values
        into.copy_(pinned[: len(values)], non_blocking=True)
        event.record()
