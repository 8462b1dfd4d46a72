"""Process 0 of a trainer and its workers: what it tells them, and what they do.

Process 0 alone reads traces, keeps the memory, judges, publishes and saves. For each update it
sends every worker the rows of its parts, so a trace is delivered once whatever the number of
processes, and a worker that dies takes nothing with it that is not in the buffer or in the
checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import Trainable, trainable
from targets.head import TargetHead
from trainer.group import Group, Message
from trainer.packing import HeldPiece
from trainer.parts import facts, from_tensors, num_parts, parts_of, to_tensors
from trainer.replica import Moments, Replica, WholeReplica
from trainer.rows import RowStore
from trainer.update import Weights, batch_dtype, is_divided, new_weights

log = logging.getLogger(__name__)

NewReplica = Callable[[Trainable[Any], TargetHead, TrainerSettings, Weights, Group], Replica]


class Team:
    """The updates of process 0, alone or with workers."""

    def __init__(
        self,
        learns: Trainable[Any],
        head: TargetHead,
        settings: TrainerSettings,
        weights: Weights,
        store: RowStore,
        group: Group,
    ) -> None:
        self._store, self._group, self._head = store, group, head
        self._num_parts = num_parts(settings.parts, group.size)
        self._kind = learns.kind
        config = learns.config_to_json(weights.model)
        self._tell("begin", {"config": config}, learns.bundle_tensors(weights.model))
        self._replica = replica_for(settings, group)(learns, head, settings, weights, group)

    def update(self, pieces: Sequence[HeldPiece], lr: float, seed: int) -> Tensor:
        """See ``Replica.update``.

        Args:
            seed: of what is drawn at random.
        """
        dtype = batch_dtype(self._store.device)
        parts = parts_of(pieces, self._num_parts, self._store, dtype, seed)
        each = self._num_parts // self._group.size
        for rank in range(1, self._group.size):
            own = parts[rank * each : (rank + 1) * each]
            values = {"kind": self._kind, "lr": lr, "parts": facts(own)}
            self._group.send(rank, Message("update", values, to_tensors(own)))
        return self._replica.update(parts[:each], lr)

    def moments(self) -> Moments:
        """See ``Replica.moments``."""
        if self._replica.is_divided:
            self._tell("moments")
        return self._replica.moments()

    def load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        """See ``Replica.load``."""
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, kind, moment in _each(moments or {}):
            tensors[f"moment.{kind}.{name}"] = moment
        self._tell("load", {"moments": moments is not None}, tensors)
        self._replica.load(weights, moments)

    def rest(self) -> None:
        """Nothing to do at present.

        Raises:
            GroupError: another process is gone.
        """
        self._group.check()

    def follow_target(self) -> None:
        """The head that this team was made with holds other weights by now: give them to all.

        Raises:
            GroupError: another process is gone.
        """
        for name, tensor in self._head.tensors().items():  # a message is a copy: one at a time
            self._tell("head", {}, {name: tensor})

    def end(self) -> None:
        """Let the workers go, if no other drafter is trained by them."""
        self._tell("end")

    def _tell(
        self,
        do: str,
        values: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        values = {"kind": self._kind, **(values or {})}
        self._group.tell_all(Message(do, values, tensors or {}))


def share_target(group: Group, fingerprint: str) -> None:
    """Tell the workers which weights of the target process 0 computes with, before any team begins:
    ``work`` refuses to compute with others."""
    group.tell_all(Message("target", {"fingerprint": fingerprint}, {}))


def work(
    group: Group,
    settings: TrainerSettings,
    head: TargetHead,
    device: torch.device,
    *,
    fingerprint: str | None = None,
) -> None:
    """Compute for process 0 until it says that this is the end. If it trains several drafters, each
    has a replica of its own here, and all do the same in the same order.

    Args:
        head: replaced in place when process 0 follows the target.
        fingerprint: of the target that ``head`` is of; ``None``: any will do.

    Raises:
        GroupError: another process is gone.
        ValueError: process 0 has other weights of the target.
    """
    replicas: dict[str, Replica] = {}
    while (message := group.receive(device)).do != "end" or _ended(replicas, message):
        if message.do == "target":
            _check_target(message.values["fingerprint"], fingerprint)
            continue
        kind = message.values["kind"]
        if message.do == "begin":
            replicas[kind] = _begun(message, group, settings, head, device)
        elif message.do == "update":
            parts = from_tensors(message.tensors, message.values["parts"], device)
            replicas[kind].update(parts, message.values["lr"])
        elif message.do == "moments":
            replicas[kind].moments()
        elif message.do == "load":
            known = _moments(message.tensors) if message.values["moments"] else None
            replicas[kind].load(_named(message.tensors, "model."), known)
        elif message.do == "head":
            for name, tensor in message.tensors.items():
                head.tensors()[name].copy_(tensor)


def _check_target(theirs: str, ours: str | None) -> None:
    """
    Raises:
        ValueError: they differ.
    """
    if ours is not None and ours != theirs:
        raise ValueError(
            f"this process has read other weights of the target ({ours[:12]}) than the first one "
            f"of this trainer ({theirs[:12]}): target and run_dir must be the same on all hosts. "
            f"If the target was replaced just now, start the trainer again"
        )


def _begun(
    message: Message,
    group: Group,
    settings: TrainerSettings,
    head: TargetHead,
    device: torch.device,
) -> Replica:
    """The replica of a drafter that process 0 begins to train."""
    learns = trainable(message.values["kind"])
    model: nn.Module = learns.load_model(message.values["config"], message.tensors)
    model = model.float().to(device)
    weights = new_weights(learns, model, model, settings, group)
    replica = replica_for(settings, group)(learns, head, settings, weights, group)
    log.info(
        "worker %d of %d is ready: process %d, for %s",
        group.rank, group.size, os.getpid(), learns.kind,
    )  # fmt: skip
    return replica


def _ended(replicas: dict[str, Replica], message: Message) -> bool:
    """Drop the replica of a drafter whose training has ended; returns whether others are left."""
    del replicas[message.values["kind"]]
    return bool(replicas)


def replica_for(settings: TrainerSettings, group: Group) -> NewReplica:
    """How the processes share the drafter.

    Raises:
        ValueError: DeepSpeed is wanted and not installed.
    """
    if not is_divided(settings, group):
        return WholeReplica
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"trainer.deepspeed.stage is {settings.deepspeed.stage}, and DeepSpeed is not "
            f"installed: pip install 'slipstream-serving[deepspeed]', or set it to 0"
        )
    from trainer.zero import ZeroReplica

    return ZeroReplica


def _each(moments: Moments) -> Iterator[tuple[str, str, Tensor]]:
    for name, own in moments.items():
        for kind, moment in own.items():
            yield name, kind, moment


def _moments(tensors: Mapping[str, Tensor]) -> Moments:
    found: Moments = {}
    for key, tensor in _named(tensors, "moment.").items():
        kind, _, name = key.partition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
