"""Decode attention with Qwen3-8B's heads over paged keys, against torch and other libraries.

    python -m benchmarks.ops.attention            # about five minutes on one H200

bfloat16, every request at the same context, pages in random order. Bytes are those of the keys and
values, read once; the ceiling is the bandwidth of a large copy. SDPA and flex_attention cannot read
pages, so their keys are gathered beforehand; SDPA is also measured including the gather, and the
fastest way of calling it counts. flashinfer reads pages, with kernels of two generations.
flex_attention takes several seconds to compile for each shape, so it is measured only at two
contexts and while time is left. If a variant cannot run, its row says why. Writes
``benchmarks/results/ops_attention.json`` after every shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.place import reason
from benchmarks.ops.timing import copy_bytes_per_s, graphed_ms
from specops import attention_triton
from specops.attention import DecodePass

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
BATCHES, CONTEXTS, QUERIES = (1, 16, 64), (512, 2048, 8192, 32768), (1, 5, 16)
FLEX_CONTEXTS = (2048, 8192)
FLASHINFER = ("fa2", "fa3")
"""flashinfer's kernels for paged keys: those of FlashAttention 2, which split a request's keys
among programs, and those written for an H100."""
SCALE = DIM**-0.5
TOO_LATE = "not run: no time left"

Work = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One measured case."""

    batch: int
    context: int
    num_query: int

    @property
    def num_bytes(self) -> int:
        """Keys and values, read once."""
        return self.batch * self.context * KV_HEADS * DIM * 2 * 2


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of a batch, paged and in the layout of SDPA."""

    keys: Tensor
    """[num_slots, Hkv, D], like ``values``."""
    values: Tensor
    pages_RP: Tensor
    k: Tensor
    """[R, Hkv, S, D], like ``v``."""
    v: Tensor


def new_cache(batch: int, context: int) -> Cache:
    num_pages = batch * context // PAGE
    shape = ((num_pages + 1) * PAGE, KV_HEADS, DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    pages_RP = (torch.randperm(num_pages, device="cuda") + 1).int().view(batch, -1)
    k, v = (gathered(pool, pages_RP).contiguous() for pool in (keys, values))
    return Cache(keys, values, pages_RP, k, v)


def gathered(pool: Tensor, pages_RP: Tensor) -> Tensor:
    """Copy the pages together; returns a [R, Hkv, S, D] view."""
    rows = pool.view(-1, PAGE, KV_HEADS, DIM).index_select(0, pages_RP.flatten())
    return rows.view(len(pages_RP), -1, KV_HEADS, DIM).transpose(1, 2)


def sdpa_variants(shape: Shape, q_THD: Tensor) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Ways of calling SDPA: from [R, Hkv, S, D] keys and values to packed rows."""
    batch, num_query = shape.batch, shape.num_query
    share = HEADS // KV_HEADS
    q = q_THD.view(batch, num_query, HEADS, DIM).transpose(1, 2)

    def grouped(k: Tensor, v: Tensor) -> Tensor:
        bias = causal_lower_right(num_query, shape.context) if num_query > 1 else None
        out = sdpa(q, k, v, attn_mask=bias, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    # Heads that share a key become rows of one head: each key is read once, at the cost of a mask.
    rows = q_THD.view(batch, num_query, KV_HEADS, share, DIM).permute(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, KV_HEADS, num_query * share, DIM)
    position = torch.arange(num_query, device="cuda") + shape.context - num_query
    mask = torch.arange(shape.context, device="cuda") <= position.repeat_interleave(share)[:, None]

    def packed(k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(rows, k, v, attn_mask=mask if num_query > 1 else None, scale=SCALE)
        out = out.view(batch, KV_HEADS, num_query, share, DIM).permute(0, 2, 1, 3, 4)
        return out.reshape(-1, HEADS, DIM)

    yield grouped
    yield packed


def flex_variant(shape: Shape, q_THD: Tensor, cache: Cache) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # it stops compiling a function after several shapes
    before = shape.context - shape.num_query
    block_mask = create_block_mask(
        lambda b, h, q, kv: kv <= q + before, None, None, shape.num_query, shape.context, "cuda"
    )
    call = torch.compile(flex_attention, dynamic=False)
    q = q_THD.view(shape.batch, shape.num_query, HEADS, DIM).transpose(1, 2)

    def work() -> Tensor:
        out = call(q, cache.k, cache.v, block_mask=block_mask, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return work


def flashinfer_variant(shape: Shape, q_THD: Tensor, cache: Cache, backend: str) -> Work:
    import flashinfer

    batch, num_pages = cache.pages_RP.shape
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend=backend
    )
    wrapper.plan(
        indptr * shape.num_query, indptr * num_pages, cache.pages_RP.flatten(),
        torch.full((batch,), PAGE, dtype=torch.int32, device="cuda"),
        HEADS, KV_HEADS, DIM, PAGE, causal=True, sm_scale=SCALE, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )  # fmt: skip
    paged = tuple(pool.view(-1, PAGE, KV_HEADS, DIM) for pool in (cache.keys, cache.values))
    return lambda: wrapper.run(q_THD, paged)


def measured_ms(shape: Shape, work: Work, want: Tensor | None = None) -> float:
    """Median time; checks the result against ``want`` first."""
    got = work()
    if want is not None:
        error = float((got.float() - want.float()).norm() / want.float().norm())
        assert error < 2e-2, f"{shape} is off by {error}"
    large = shape.num_bytes > 1e9
    return graphed_ms(work, calls=2 if large else 5)


def tried_ms(shape: Shape, make: Callable[[], Work], want: Tensor) -> float | str:
    """``measured_ms``, or why there is no figure."""
    try:
        return measured_ms(shape, make(), want)
    except Exception as error:  # whatever the cause, the other rows are still useful
        return reason(error)


def alternatives(
    shape: Shape, q_THD: Tensor, cache: Cache, want: Tensor, deadline_s: float
) -> dict[str, float | str]:
    """Milliseconds of every alternative, or why there is no figure."""
    found: dict[str, float | str] = {}
    variants = list(sdpa_variants(shape, q_THD))
    times = [tried_ms(shape, lambda w=w: partial(w, cache.k, cache.v), want) for w in variants]
    numbers = [time for time in times if isinstance(time, float)]
    found["sdpa_gathered_ms"] = min(numbers) if numbers else times[0]
    if numbers:
        variant = variants[times.index(min(numbers))]

        def with_gather() -> Tensor:
            k, v = (gathered(pool, cache.pages_RP) for pool in (cache.keys, cache.values))
            return variant(k, v)

        torch.cuda.empty_cache()
        found["sdpa_with_gather_ms"] = tried_ms(shape, lambda: with_gather, want)
    for backend in FLASHINFER:
        make = partial(flashinfer_variant, shape, q_THD, cache, backend)
        found[f"flashinfer_{backend}_ms"] = tried_ms(shape, make, want)
    torch.cuda.empty_cache()
    if shape.context in FLEX_CONTEXTS:
        make = partial(flex_variant, shape, q_THD, cache)
        is_late = time.perf_counter() > deadline_s
        found["flex_gathered_ms"] = TOO_LATE if is_late else tried_ms(shape, make, want)
    return found


def row_of(shape: Shape, cache: Cache, copy_rate: float, deadline_s: float) -> dict[str, Any]:
    """Milliseconds, and shares of the copy bandwidth."""
    num_rows = shape.batch * shape.num_query
    q_THD = torch.randn(num_rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    start = shape.context - shape.num_query
    first_R = torch.full((shape.batch,), start, device="cuda").int()
    decode = DecodePass(cache.pages_RP, first_R, PAGE)
    # These rows are in the cache already, so writing them changes nothing.
    k_THD, v_THD = (t[:, :, start:].transpose(1, 2).flatten(0, 1) for t in (cache.k, cache.v))

    def ours() -> Tensor:
        return attention_triton.attend_pages(q_THD, cache.keys, cache.values, decode, SCALE)

    def ours_with_writing() -> Tensor:
        attention_triton.write_rows(k_THD, v_THD, cache.keys, cache.values, decode)
        return ours()

    found: dict[str, float | str] = {
        "ours_ms": measured_ms(shape, ours),
        "ours_with_writing_ms": measured_ms(shape, ours_with_writing),
        **alternatives(shape, q_THD, cache, ours(), deadline_s),
    }
    floor_ms = shape.num_bytes / copy_rate * 1e3
    shares = {
        name.removesuffix("_ms") + "_share": floor_ms / ms
        for name, ms in found.items()
        if isinstance(ms, float)
    }
    return {
        **asdict(shape), "num_bytes": shape.num_bytes, "floor_ms": floor_ms, **found, **shares,
    }  # fmt: skip


def rows(deadline_s: float) -> Iterator[dict[str, Any]]:
    """Every case; needs up to 40 GB of memory, at the largest batch and longest context."""
    copy_rate = copy_bytes_per_s()
    for batch in BATCHES:
        for context in CONTEXTS:
            cache = new_cache(batch, context)
            for num_query in QUERIES:
                yield row_of(Shape(batch, context, num_query), cache, copy_rate, deadline_s)
            del cache
            torch.cuda.empty_cache()


def main(
    out: Out = RESULTS / "ops_attention.json",
    budget_s: Annotated[float, typer.Option(help="flex_attention is not tried after this")] = 400.0,
) -> None:
    """Measure all batches, contexts and numbers of query rows."""
    torch.manual_seed(0)
    write_each(out, rows(time.perf_counter() + budget_s))


if __name__ == "__main__":
    typer.run(main)
