"""The processes of one trainer, and what they say to each other.

Process 0 is the trainer; the others are its workers, which only compute. Messages are safetensors
with a line of JSON: nothing is unpickled. They go from process 0 to a worker over gloo; gradients
are summed over gloo on CPUs and NCCL on GPUs.

Whoever reaches the port of process 0 can join: on several hosts it belongs in a trusted network.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from targets.device import pick_device

_PATIENCE = timedelta(hours=1)
"""For which a process waits for the others. One that dies closes its connections, which the others
see at once; this is for a host that vanishes. An idle trainer speaks more often."""
_TEXT = "text of the message"
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class GroupError(RuntimeError):
    """Another process of the trainer is gone."""


@dataclass(frozen=True, slots=True)
class Message:
    """What process 0 tells a worker."""

    do: str
    values: dict[str, Any]
    """As JSON has them."""
    tensors: dict[str, Tensor]
    """On the CPU."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those of the trainer."""

    rank: int
    """0: the trainer itself."""
    size: int
    local_rank: int = 0
    """Number of the process on its host, and of its GPU."""

    def send(self, rank: int, message: Message) -> None:
        """Send a message from process 0 to another.

        Raises:
            GroupError: a process is gone.
        """
        text = json.dumps({"do": message.do, "values": message.values}).encode()
        tensors = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
        tensors[_TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        content = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
        with _in_words():
            dist.send(torch.tensor([len(content)], dtype=torch.int64), rank)
            dist.send(content, rank)

    def tell_all(self, message: Message) -> None:
        """Send a message from process 0 to all others."""
        for rank in range(1, self.size):
            self.send(rank, message)

    def receive(self) -> Message:
        """The next message of process 0.

        Raises:
            GroupError: a process is gone.
        """
        length = torch.zeros(1, dtype=torch.int64)
        with _in_words():
            dist.recv(length, 0)
            content = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(content, 0)
        tensors = load(content.numpy().tobytes())
        body = json.loads(tensors.pop(_TEXT).numpy().tobytes())
        return Message(body["do"], body["values"], tensors)

    def add_up(self, flat: Tensor) -> None:
        """Replace a tensor by its sum over all processes: the same bits in each of them.

        Raises:
            GroupError: a process is gone.
        """
        if self.size > 1:
            with _in_words():
                dist.all_reduce(flat)


def single() -> Group:
    """The group of a trainer that is one process."""
    return Group(0, 1)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """Join the processes that the environment names in ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``
    and ``MASTER_PORT``, as torchrun sets them, and leave them at the end.

    Args:
        device: ``trainer.device``.

    Raises:
        ValueError: a variable is missing or not a number.
        GroupError: the others did not come.
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be set by what starts the processes of a trainer: use "
            f"trainer launch --on local, torchrun, deepspeed, slurm or kubernetes"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = Group(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    own = device_of(device, group)
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(0)  # NCCL's; there is no other
        backend = "cpu:gloo,cuda:nccl"
    with _in_words():
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def device_of(name: str, group: Group) -> torch.device:
    """The device of this process: of several GPUs the one with its number on the host.

    Raises:
        ValueError: see ``pick_device``; or there are fewer GPUs than processes.
    """
    return pick_device(name, setting="trainer.device", further=group.local_rank)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise GroupError(
            f"another process of this trainer is gone ({first}); ending. Nothing acknowledged is "
            f"lost: started again, the trainer resumes from its last checkpoint"
        ) from error
