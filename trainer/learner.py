"""The drafter in training, and its updates.

An update whose loss or gradient is not finite is skipped; three in a row mean that the weights
themselves are broken. Candidates are the running average of the weights: at a constant learning
rate, the noise of small batches costs a drafter that was annealed offline what it gains from them,
and averaging keeps the gain. With 4 passes over 62 requests of C at learning rate 1e-3,
tokens_per_step of the bundled drafter went from 2.85 to 3.00 with averaging, and to 2.76 without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import Trainable
from targets.head import TargetHead
from trainer.figures import Figures, Launched, UpdateReport
from trainer.group import Group, single
from trainer.host import Arriving, HostCopies
from trainer.packing import HeldPiece, every_shape, pack
from trainer.replica import Moments, load_into, load_model, moments_of
from trainer.rows import RowStore
from trainer.team import Team
from trainer.update import UpdateProgram, new_weights

MAX_SKIPS = 3
"""Consecutive skipped updates after which the weights are restored."""
_PREFIX = "adam."
"""Of all that an optimizer remembers, in a checkpoint."""


class Learner:
    """Weights, optimizer and counters of updates."""

    def __init__(
        self,
        trainable: Trainable[Any],
        model: nn.Module,
        head: TargetHead,
        settings: TrainerSettings,
        store: RowStore,
        use_graphs: bool | None = None,
        group: Group | None = None,
    ) -> None:
        """
        Args:
            store: holds the rows of all batches, on the device to train on.
            use_graphs: capture updates in CUDA graphs; ``None``: on a GPU.
            group: the trainer's processes, of which this is the first; ``None``: it is the only
                one. The others are in ``team.work``.
        """
        group = group or single()
        device = store.device
        self.trainable = trainable
        self.head = head
        self.settings = settings
        self.store = store
        self.generator = torch.Generator()
        self.step = 0
        """Updates launched so far, skipped ones included."""
        self.num_skipped = 0
        """Skipped updates among those whose figures have arrived."""
        self.skips_in_row = 0
        """The newest of them that follow each other."""
        self.lr_scale = 1.0
        """Halved whenever the weights are restored."""
        model = model.float().to(device)
        average = copy.deepcopy(model).requires_grad_(False)
        self.weights = new_weights(trainable, model, average, settings, group)
        self.figures = Figures(device, settings.ttt_steps)
        self.program = UpdateProgram(
            trainable,
            head,
            settings,
            self.weights,
            store,
            self.figures,
            self.generator,
            use_graphs,
        )
        self.team: Team | None = None
        """Computes updates in parts; ``None``: they are computed whole, by ``program``."""
        if group.size > 1 or settings.parts > 1:
            self.team = Team(trainable, head, settings, self.weights, store, group)

    @property
    def model(self) -> nn.Module:
        """The drafter in training."""
        return self.weights.model

    @property
    def average(self) -> nn.Module:
        """Running average of its weights: the next candidate."""
        return self.weights.average

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        warm = min(1.0, (self.step + 1) / max(self.settings.warmup_steps, 1))
        return self.settings.lr * self.lr_scale * warm

    @property
    def runs_ahead(self) -> bool:
        """Updates are made on a device, beside what the host does."""
        return self.store.device.type == "cuda"

    @property
    def fixed_shape(self) -> tuple[int, int] | None:
        """Positions of a batch and of a piece at most, if all batches have the same."""
        if not self.runs_ahead or self.team is not None:
            return None
        longest = self.settings.max_sequence
        return max(self.settings.batch_tokens, longest), longest

    def capture_all(self) -> None:
        """See ``UpdateProgram.capture_all``. The store must be allocated."""
        if self.fixed_shape is not None:
            self.program.capture_all(every_shape(self.fixed_shape))

    def give_up_graphs(self) -> bool:
        """See ``UpdateProgram.give_up_graphs``."""
        return self.program.give_up_graphs()

    def not_finite(self) -> list[str]:
        """Names of weights, averages and moments, as ``state_tensors`` has them, that hold a NaN or
        an infinity; of moments that processes divide nothing is known. Waits for the device."""
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        moments = moments_of(self.weights) if self.team is None else {}
        for name, state in moments.items():
            tensors |= {f"{_PREFIX}{kind}.{name}": moment for kind, moment in state.items()}
        return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]

    def update(self, pieces: Sequence[HeldPiece]) -> list[UpdateReport]:
        """Train on one batch; skipped if its loss or gradient is not finite.

        Returns:
            Figures of this and earlier updates, as far as they have arrived: on a CPU those of this
            one.
        """
        lr = self.lr
        num_rows = self._launch(pieces, lr)
        self.step += 1
        return self._counted(self.figures.launched(Launched(self.step, num_rows, lr)))

    def _launch(self, pieces: Sequence[HeldPiece], lr: float) -> int:
        """Launch an update; returns its rows with a loss."""
        if self.team is None:
            packed = pack(pieces, self.fixed_shape)
            self.program.launch(packed, lr)
            return packed.num_rows
        seed = int(torch.randint(1 << 62, (1,), generator=self.generator))
        row, steps = self.team.update(pieces, lr, seed), self.settings.ttt_steps
        self.figures.write(row[0], row[1], row[2], row[3 : 3 + steps], row[3 + steps :])
        return sum(len(piece.rows) for piece in pieces)

    def wait(self) -> None:
        """Wait until the device has made all updates that were launched."""
        if self.runs_ahead:
            torch.cuda.current_stream(self.store.device).synchronize()

    def settle(self) -> list[UpdateReport]:
        """Wait for all updates that were launched; returns the figures that were still missing."""
        return self._counted(self.figures.settle())

    def rest(self) -> None:
        """Nothing to train on at present: tell the other processes, if there are any."""
        if self.team is not None:
            self.team.rest()

    def follow_target(self) -> None:
        """``head`` holds other weights by now: give them to the other processes."""
        if self.team is not None:
            self.team.follow_target()

    def end(self) -> None:
        """Let the other processes go, if there are any."""
        if self.team is not None:
            self.team.end()

    def _counted(self, reports: list[UpdateReport]) -> list[UpdateReport]:
        for report in reports:
            self.num_skipped += int(report.skipped)
            self.skips_in_row = self.skips_in_row + 1 if report.skipped else 0
        return reports

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies of weights, their average, moments and generator, on the CPU."""
        return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in self._state().items()}

    def begin_state(self, memory: HostCopies) -> Arriving:
        """The same beside what comes next; the next call overwrites the copies."""
        return memory.begin(self._state())

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        moments = moments_of(self.weights) if self.team is None else self.team.moments()
        for name, state in moments.items():
            tensors |= {f"{_PREFIX}{kind}.{name}": moment for kind, moment in state.items()}
        tensors["num_averaged"] = self.weights.num_averaged
        tensors["generator"] = self.generator.get_state()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that ``state_tensors`` returned.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a weight is missing, unknown or misshapen.
        """
        self._load(_named(tensors, "model."), _moments(tensors))
        self.average.load_state_dict(_named(tensors, "average."))
        self.weights.num_averaged.copy_(tensors["num_averaged"])
        self.generator.set_state(tensors["generator"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights and their average, and reset the optimizer.

        Raises:
            ValueError: a weight is missing, unknown or misshapen.
        """
        self._load(weights, None)
        load_model(self.average, weights)
        self.weights.num_averaged.zero_()

    def _load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        if self.team is None:
            load_into(self.weights, weights, moments)
        else:
            self.team.load(weights, moments)
        self.skips_in_row = 0
        self.figures.forget()


def _moments(tensors: Mapping[str, Tensor]) -> Moments:
    found: Moments = {}
    for key, tensor in _named(tensors, _PREFIX).items():
        kind, _, name = key.partition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
