"""Where the time of an update at one shape goes: its parts, its kernels, and its products alone.

Called by ``benchmarks.utilisation --parts``, which says what is measured. Updates are computed as
written, not captured, and a part ends when the device has done it; on a CPU, when it returns.

- ``gather``, ``forward`` (the drafter's layer in all steps), ``loss`` (the teacher's logits, the
  drafter's, and the gradients of both sides of its lm_head), ``backward`` (of the layer), ``clip``,
  ``optimizer`` and ``average``;
- ``products``: the same products with weights, on their own and of the same shapes. No update of
  these shapes can be faster than their sum;
- ``agreement``: loss and gradients of a smaller batch with the kernels of an update and with
  torch's operations, both in bfloat16, against float32 by torch. The two should be alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learner import release, wait_for
from specops import device as dispatch
from specops.distill import FrozenHead
from targets.head import TargetHead
from trainer.learner import Learner
from trainer.packing import HeldPiece, Packed, pack
from trainer.rows import index_of
from trainer.update import batch_dtype, update_average

REPEATS = 4
_KERNELS = 25
"""Kernels listed, by the time that they take together."""
_SMALL = 8
"""The agreement's batch has a part of the pieces of an update's."""
_BLOCK_ROWS = 14_336
"""Rows of the drafter's logits at once, and of the teacher's."""
_TEACHER_ROWS = 512

Say = Callable[[str], None]


@dataclass(slots=True)
class Marks:
    """Times at which a device has reached something."""

    device: torch.device
    events: list[tuple[str, Any]] = field(default_factory=list)

    def at(self, name: str) -> None:
        """The part called ``name`` ends here, or what comes before the first part."""
        if self.device.type != "cuda":
            self.events.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.events.append((name, event))

    def ms(self) -> dict[str, float]:
        """Milliseconds of each part. Waits for the device."""
        wait_for(self.device)
        found: dict[str, float] = {}
        for (_, begun), (name, ended) in zip(self.events, self.events[1:], strict=False):
            took = (
                begun.elapsed_time(ended) if self.device.type == "cuda" else 1000 * (ended - begun)
            )
            found[name] = found.get(name, 0.0) + took
        return found


def marked_update(learner: Learner, packed: Packed) -> dict[str, float]:
    """Milliseconds of each part of an update, made as ``UpdateProgram`` makes it."""
    weights, settings, store = learner.weights, learner.settings, learner.store
    marks = Marks(store.device)
    hook = weights.model.register_forward_hook(lambda *_: marks.at("forward"))
    columns = torch.from_numpy(packed.columns()).to(store.device)
    weights.lr.fill_(learner.lr)
    weights.model.zero_grad(set_to_none=True)
    marks.at("start")
    index = index_of(columns, len(packed.slots_T))
    batch = store.gather(index, packed.longest, batch_dtype(store.device))
    marks.at("gather")
    given = weights.model, learner.head, batch, settings, learner.generator
    computed = learner.trainable.loss(*given)
    loss = computed.loss.detach()
    marks.at("loss")
    computed.loss.backward()  # type: ignore[no-untyped-call]
    marks.at("backward")
    norm = nn.utils.clip_grad_norm_(weights.model.parameters(), settings.grad_clip)
    marks.at("clip")
    skipped = ~(torch.isfinite(loss) & torch.isfinite(norm))
    weights.optimizer.step(skipped)
    marks.at("optimizer")
    update_average(weights, skipped, settings.average_decay)
    marks.at("average")
    hook.remove()
    return marks.ms()


def middle(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each part."""
    return {name: sorted(row[name] for row in rows)[len(rows) // 2] for name in rows[0]}


# ---- products alone ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` times ``[rows, inputs] @ [inputs, outputs]``, with gradients or without."""

    name: str
    rows: int
    inputs: int
    outputs: int
    count: int = 1
    kinds: tuple[str, ...] = ("forward", "rows", "weight")
    """Products of the three that are computed."""

    @property
    def flops(self) -> int:
        """Of all of them."""
        return 2 * self.rows * self.inputs * self.outputs * self.count * len(self.kinds)


def products_of(learner: Learner, packed: Packed) -> list[Product]:
    """Products with weights of an update whose chains are carried to their end."""
    model, steps = learner.model, learner.settings.ttt_steps
    num, rows = len(packed.slots_T), len(packed.row_R)
    found = []
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        sizes = linear.in_features, linear.out_features
        if name == "fc":
            found.append(Product(name, num, *sizes, kinds=("forward", "weight")))
        elif name == "lm_head":
            found.append(Product(name, steps * rows, *sizes))
        else:
            found.append(Product(name, num, *sizes))
            found.append(Product(f"{name}, later", rows, *sizes, count=steps - 1))
    vocab, hidden = learner.head.lm_head.weight_VH.shape
    return [*found, Product("teacher", rows, hidden, vocab, kinds=("forward",))]


def product_ms(one: Product, device: torch.device) -> float:
    """Milliseconds, in blocks where an update has blocks."""
    dtype = batch_dtype(device)
    most = {"lm_head": _BLOCK_ROWS, "teacher": _TEACHER_ROWS}.get(one.name, one.rows)
    most = min(most, one.rows)
    rows = torch.randn(most, one.inputs, device=device, dtype=dtype)
    weight = torch.randn(one.outputs, one.inputs, device=device, dtype=dtype)
    slopes = torch.randn(most, one.outputs, device=device, dtype=dtype)

    def work() -> None:
        for start in range(0, one.rows, most):
            part = slice(0, min(most, one.rows - start))
            if "forward" in one.kinds:
                torch.mm(rows[part], weight.T, out=slopes[part])
            if "rows" in one.kinds:
                torch.mm(slopes[part], weight)
            if "weight" in one.kinds:
                torch.mm(slopes[part].T, rows[part])

    marks = Marks(device)
    work()
    marks.at("start")
    for _ in range(REPEATS):
        work()
    marks.at("all")
    return marks.ms()["all"] / REPEATS * one.count


def products_alone(learner: Learner, packed: Packed) -> list[dict[str, Any]]:
    """Each with its milliseconds and TFLOP/s."""
    found = []
    for one in products_of(learner, packed):
        ms = product_ms(one, learner.store.device)
        found.append({"name": one.name, "ms": ms, "tflops": one.flops / ms / 1e9})
    return found


# ---- agreement -----------------------------------------------------------------------------------


@contextmanager
def without_kernels() -> Iterator[None]:
    """Rows of an update are computed by torch."""
    before, dispatch._LOW = dispatch._LOW, ()
    try:
        yield
    finally:
        dispatch._LOW = before


def loss_and_slopes(learner: Learner, packed: Packed, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and all gradients of one batch, rows in ``dtype``."""
    store, head = learner.store, learner.head
    columns = torch.from_numpy(packed.columns()).to(store.device)
    batch = store.gather(index_of(columns, len(packed.slots_T)), packed.longest, dtype)
    frozen = FrozenHead(head.lm_head.weight_VH.to(dtype), head.lm_head.softcap)
    learner.model.zero_grad(set_to_none=True)
    given = TargetHead(head.config, head.embed_VH, frozen), batch, learner.settings
    loss = learner.trainable.loss(learner.model, *given, learner.generator).loss
    loss.backward()  # type: ignore[no-untyped-call]
    slopes = [p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]
    learner.model.zero_grad(set_to_none=True)
    return float(loss.detach()), torch.cat(slopes)


def agreement(learner: Learner, packed: Packed) -> dict[str, float]:
    """How far losses and gradients in the dtype of an update are from those in float32."""
    dtype = batch_dtype(learner.store.device)
    with without_kernels():
        wanted, slopes = loss_and_slopes(learner, packed, torch.float32)
        by_torch = loss_and_slopes(learner, packed, dtype)
    by_kernels = loss_and_slopes(learner, packed, dtype)
    found = {"loss": wanted}
    for name, (loss, own) in (("torch", by_torch), ("kernels", by_kernels)):
        found[f"{name}_loss_error"] = abs(loss - wanted) / abs(wanted)
        found[f"{name}_slope_error"] = float((own - slopes).norm() / slopes.norm())
    return found


# ---- kernels -------------------------------------------------------------------------------------


def kernels_of(learner: Learner, packed: Packed) -> list[dict[str, Any]]:
    """Kernels of one update by torch's profiler, those that take longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        marked_update(learner, packed)
    own = [one for one in profile.key_averages() if one.device_type.name == "CUDA"]
    own.sort(key=lambda one: -one.self_device_time_total)
    return [
        {"name": one.key[:90], "ms": one.self_device_time_total / 1000, "launches": one.count}
        for one in own[:_KERNELS]
    ]


# ---- all of it -----------------------------------------------------------------------------------


def parts_of(learner: Learner, pieces: Sequence[HeldPiece], say: Say) -> dict[str, Any]:
    """All parts, said as they are known. The learner's graphs are given up."""
    device = learner.store.device
    learner.settle()
    learner.give_up_graphs()
    release(device)
    packed = pack(pieces, learner.fixed_shape)
    marked_update(learner, packed)  # loads what a captured update had loaded elsewhere
    ms = middle([marked_update(learner, packed) for _ in range(REPEATS)])
    found: dict[str, Any] = {"ms": ms, "rows": len(packed.row_R), "all_ms": sum(ms.values())}
    say(f"parts of {found['all_ms']:.1f} ms: " + listed(ms))
    products = found["products"] = products_alone(learner, packed)
    floor_ms = found["products_ms"] = sum(one["ms"] for one in products)
    say(f"products alone take {floor_ms:.1f} ms:")
    for one in products:
        say(f"  {one['name']:24} {one['ms']:7.2f} ms {one['tflops']:6.0f} TFLOP/s")
    release(device)
    small = pack(pieces[: max(1, len(pieces) // _SMALL)], None)
    found["agreement"] = agreement(learner, small)
    say("against float32: " + ", ".join(f"{k} {v:.2e}" for k, v in found["agreement"].items()))
    release(device)
    if device.type == "cuda":
        try:
            found["kernels"] = kernels_of(learner, packed)
        except RuntimeError as error:  # no profiler on this machine; all else is known
            say(f"no kernels: {error}")
        for one in found.get("kernels", ()):
            say(f"  {one['ms']:7.2f} ms {one['launches']:4} x {one['name']}")
    return found


def listed(ms: dict[str, float]) -> str:
    """In one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in ms.items())
