"""The processes of one trainer, and what they say to each other.

Process 0 is the trainer; the others are its workers, which only compute. A message is a line of
JSON, which names its tensors, and their bytes: nothing is unpickled. Tensors in a GPU's memory go
from GPU to GPU over NCCL, all else over the connections of ``links.py``, which also tell when a
process is gone. Gradients are summed over NCCL on GPUs and gloo on CPUs. The rows of an 8B target
take 32 KiB a position: by way of the host they would take longer than an update.

Whoever reaches the port of process 0 can join: on several hosts it belongs in a trusted network.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from targets.device import pick_device
from trainer.links import GroupError, Links, open_links

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=1)
"""For which a process waits for the others to come, and for their part of a sum. Who dies is known
sooner."""
_NEWS_S = 5.0
"""For which to wait, after work with others has failed, for the news that one of them is gone."""
_ALIGNED = 16
"""Tensors of a message begin at multiples of so many bytes."""
_LENGTH_BYTES = 8
"""Of the number of bytes of a message's JSON."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Message:
    """What process 0 tells a worker."""

    do: str
    values: dict[str, Any]
    """As JSON has them."""
    tensors: dict[str, Tensor]
    """On the CPU, or on the GPU of the process."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those of the trainer."""

    rank: int
    """0: the trainer itself."""
    size: int
    local_rank: int = 0
    """Number of the process on its host, and of its GPU."""
    links: Links | None = None
    """To the other processes; ``None``: there are none."""

    def send(self, rank: int, message: Message) -> None:
        """Send a message from process 0 to another.

        Raises:
            GroupError: a process is gone.
        """
        links = self._links
        facts, contents = packed(message.tensors)
        body = {"do": message.do, "values": message.values, "tensors": facts}
        text = json.dumps(body).encode()
        links.send(rank, [len(text).to_bytes(_LENGTH_BYTES, "little"), text])
        for content in filter(len, contents.values()):
            if content.device.type == "cpu":
                links.send(rank, [content.numpy().data])
            else:
                with self.shared_work():
                    dist.send(content, rank)

    def tell_all(self, message: Message) -> None:
        """Send a message from process 0 to all others."""
        for rank in range(1, self.size):
            self.send(rank, message)

    def receive(self, device: torch.device) -> Message:
        """The next message of process 0. Waits for it for ever.

        Args:
            device: of this process: tensors that are on a GPU there are on this one here.

        Raises:
            GroupError: a process is gone.
        """
        links = self._links
        length = bytearray(_LENGTH_BYTES)
        links.receive(0, memoryview(length))
        text = bytearray(int.from_bytes(length, "little"))
        links.receive(0, memoryview(text))
        body = json.loads(text)
        contents: dict[str, Tensor] = {}
        for place, num_bytes in _sizes(body["tensors"]).items():
            where = device if place == device.type else torch.device("cpu")
            content = torch.empty(num_bytes, dtype=torch.uint8, device=where)
            contents[place] = content
            if num_bytes and place == "cpu":
                links.receive(0, content.numpy().data)
            elif num_bytes:
                with self.shared_work():
                    dist.recv(content, 0)
        return Message(body["do"], body["values"], unpacked(body["tensors"], contents))

    def add_up(self, flat: Tensor) -> None:
        """Replace a tensor by its sum over all processes: the same bits in each of them.

        Raises:
            GroupError: a process is gone.
        """
        if self.size > 1:
            with self.shared_work():
                dist.all_reduce(flat)

    def check(self) -> None:
        """
        Raises:
            GroupError: a process is gone.
        """
        if self.links is not None and self.links.gone is not None:
            raise GroupError(self.links.gone)

    @contextlib.contextmanager
    def shared_work(self) -> Iterator[None]:
        """Context of work in which other processes take part.

        Raises:
            GroupError: in place of the error that such work ends with if one of them is gone.
        """
        self.check()
        try:
            yield
        except RuntimeError as error:
            gone = None if self.links is None else self.links.why(_NEWS_S)
            if gone is None or isinstance(error, GroupError):
                raise
            raise GroupError(gone) from error

    @property
    def _links(self) -> Links:
        assert self.links is not None, "a single process has nobody to talk to"
        return self.links


Facts = dict[str, tuple[str, list[int], str, int]]
"""Name of a tensor -> dtype, shape, kind of device, and offset in bytes among those on it."""


def packed(tensors: Mapping[str, Tensor]) -> tuple[Facts, dict[str, Tensor]]:
    """Tensors as the bytes of a message: what is on the CPU and what is on a GPU apart."""
    facts: Facts = {}
    ends: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        place = tensor.device.type
        facts[name] = kind, shape, place, ends.get(place, 0)
        ends[place] = ends.get(place, 0) + _room(tensor.nbytes)
    contents: dict[str, Tensor] = {}
    for name, (_, _, place, start) in facts.items():
        tensor = tensors[name].detach()
        if place not in contents:
            size = ends[place]
            contents[place] = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        contents[place][start : start + len(bits)].copy_(bits)
    return facts, contents


def unpacked(facts: Facts, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``packed``: views into the contents."""
    found: dict[str, Tensor] = {}
    for name, (kind, shape, place, start) in facts.items():
        num_bytes = math.prod(shape) * _DTYPES[kind].itemsize
        bits = contents[place][start : start + num_bytes]
        found[name] = bits.view(_DTYPES[kind]).view(shape)
    return found


def _sizes(facts: Facts) -> dict[str, int]:
    """Bytes on each kind of device, in the order in which they are sent."""
    sizes: dict[str, int] = {}
    for kind, shape, place, start in facts.values():
        sizes[place] = start + _room(math.prod(shape) * _DTYPES[kind].itemsize)
    return sizes


def _room(num_bytes: int) -> int:
    """What a tensor takes of a message."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


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
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    own = device_of(device, Group(rank, size, local_rank))
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(0)  # NCCL's; there is no other
        backend = "cpu:gloo,cuda:nccl"
    began_s = time.monotonic()
    links = _met(backend, rank, size)
    log.info(
        "process %d of %d has met the others in %.1f s", rank, size, time.monotonic() - began_s
    )
    try:
        yield Group(rank, size, local_rank, links)
    except BaseException as error:
        links.leave(error)
        _break_off(own)
        raise
    else:
        links.leave()
        dist.destroy_process_group()
    finally:
        links.close()


def _met(backend: str, rank: int, size: int) -> Links:
    """Meet the other processes.

    Raises:
        GroupError: they did not come.
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_PATIENCE))
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
        return open_links(rank, size, os.environ["MASTER_ADDR"], store)
    except GroupError:
        raise
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise GroupError(f"the other processes of this trainer did not come ({first})") from error


def _break_off(device: torch.device) -> None:
    """Leave the others in the middle of things. What is under way over NCCL would wait for them."""
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def device_of(name: str, group: Group) -> torch.device:
    """The device of this process: of several GPUs the one with its number on the host.

    Raises:
        ValueError: see ``pick_device``; or there are fewer GPUs than processes.
    """
    return pick_device(name, setting="trainer.device", further=group.local_rank)
