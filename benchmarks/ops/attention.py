"""Decode attention of Qwen3-8B's heads over paged keys, against what torch and others offer.

    python -m benchmarks.ops.attention            # about a minute on one H200
    python -m benchmarks.ops.attention --sweep    # which way to cut batch 16 would be best

bfloat16, every request at the same context, pages in random order. Bytes are those of the keys and
values read once; the ceiling is a large copy. SDPA and flex_attention cannot read pages, so their
keys lie gathered already, and SDPA is measured with that gathering, too; of the ways to call SDPA
the fastest counts. Writes ``benchmarks/results/ops_attention.json``.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.ops.timing import copy_bytes_per_s, graphed
from benchmarks.result import write_result
from specops import attention_triton
from specops.attention import DecodePass
from specops.attention_triton import Tiling, choose_tiling

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
BATCHES, CONTEXTS, QUERIES = (1, 16, 64), (512, 2048, 8192, 32768), (1, 5, 16)
FLEX = {(16, 2048, 1), (16, 2048, 5)}  # each compiles for several seconds
SCALE = DIM**-0.5

Work = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One measured case."""

    batch: int
    context: int
    num_query: int
    is_ragged: bool = False
    """Lengths from an eighth of the context to all of it, instead of all the same."""

    @property
    def lengths(self) -> list[int]:
        """Keys of each request."""
        if not self.is_ragged:
            return [self.context] * self.batch
        return torch.linspace(self.context / 8, self.context, self.batch).int().tolist()

    @property
    def num_bytes(self) -> int:
        """Keys and values, read once."""
        return sum(self.lengths) * KV_HEADS * DIM * 2 * 2


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of a batch, paged and as SDPA wants them."""

    keys: Tensor
    """[num_slots, Hkv, D], as ``values``."""
    values: Tensor
    pages_RP: Tensor
    k: Tensor
    """[R, Hkv, S, D], as ``v``."""
    v: Tensor


def new_cache(batch: int, context: int) -> Cache:
    num_pages = batch * context // PAGE
    shape = ((num_pages + 1) * PAGE, KV_HEADS, DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    pages_RP = (torch.randperm(num_pages, device="cuda") + 1).int().view(batch, -1)
    k, v = (gathered(pool, pages_RP).contiguous() for pool in (keys, values))
    return Cache(keys, values, pages_RP, k, v)


def gathered(pool: Tensor, pages_RP: Tensor) -> Tensor:
    """[R, Hkv, S, D] view of the copied pages."""
    rows = pool.view(-1, PAGE, KV_HEADS, DIM).index_select(0, pages_RP.flatten())
    return rows.view(len(pages_RP), -1, KV_HEADS, DIM).transpose(1, 2)


def sdpa_ways(shape: Shape, q_THD: Tensor) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Ways to have SDPA do it, from [R, Hkv, S, D] keys and values to packed rows."""
    batch, num_query = shape.batch, shape.num_query
    share = HEADS // KV_HEADS
    q = q_THD.view(batch, num_query, HEADS, DIM).transpose(1, 2)

    def grouped(k: Tensor, v: Tensor) -> Tensor:
        bias = causal_lower_right(num_query, shape.context) if num_query > 1 else None
        out = sdpa(q, k, v, attn_mask=bias, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    # Heads that share a key as rows of one: reads each key once, but needs a mask of its own.
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


def flex_way(shape: Shape, q_THD: Tensor, cache: Cache) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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


def flashinfer_way(shape: Shape, q_THD: Tensor, cache: Cache) -> Work:
    import flashinfer

    batch, num_pages = cache.pages_RP.shape
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD"
    )
    wrapper.plan(
        indptr * shape.num_query, indptr * num_pages, cache.pages_RP.flatten(),
        torch.full((batch,), PAGE, dtype=torch.int32, device="cuda"),
        HEADS, KV_HEADS, DIM, PAGE, causal=True, q_data_type=torch.bfloat16,
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
    return graphed(work, calls=2 if large else 5).median_ms


def guarded_ms(shape: Shape, make: Callable[[], Work], want: Tensor) -> float | str:
    """As ``measured_ms``, or why there is no figure."""
    try:
        return measured_ms(shape, make(), want)
    except Exception as error:  # whatever it is, the other rows are worth having
        return f"{type(error).__name__}: {str(error)[:200]}"


def alternatives(shape: Shape, q_THD: Tensor, cache: Cache, want: Tensor) -> dict[str, float | str]:
    """Milliseconds of every other way that applies, or why there is no figure."""
    found: dict[str, float | str] = {}
    ways = list(sdpa_ways(shape, q_THD))
    times = [guarded_ms(shape, lambda w=w: partial(w, cache.k, cache.v), want) for w in ways]
    numbers = [time for time in times if isinstance(time, float)]
    found["sdpa_gathered_ms"] = min(numbers) if numbers else times[0]
    if numbers:
        way = ways[times.index(min(numbers))]

        def with_gather() -> Tensor:
            k, v = (gathered(pool, cache.pages_RP) for pool in (cache.keys, cache.values))
            return way(k, v)

        torch.cuda.empty_cache()
        found["sdpa_with_gather_ms"] = guarded_ms(shape, lambda: with_gather, want)
    if (shape.batch, shape.context, shape.num_query) in FLEX:
        found["flex_gathered_ms"] = guarded_ms(shape, lambda: flex_way(shape, q_THD, cache), want)
    if importlib.util.find_spec("flashinfer") is not None:
        found["flashinfer_ms"] = guarded_ms(
            shape, lambda: flashinfer_way(shape, q_THD, cache), want
        )
    torch.cuda.empty_cache()
    return found


def row_of(shape: Shape, cache: Cache, copy_rate: float) -> dict[str, Any]:
    num_rows = shape.batch * shape.num_query
    q_THD = torch.randn(num_rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    start = shape.context - shape.num_query
    first_R = torch.full((shape.batch,), start, device="cuda").int()
    decode = DecodePass(cache.pages_RP, first_R, PAGE)
    # The rows that are there already, so that writing them changes nothing.
    k_THD, v_THD = (t[:, :, start:].transpose(1, 2).flatten(0, 1) for t in (cache.k, cache.v))

    def ours() -> Tensor:
        return attention_triton.attend_pages(q_THD, cache.keys, cache.values, decode, SCALE)

    def ours_with_writing() -> Tensor:
        attention_triton.write_rows(k_THD, v_THD, cache.keys, cache.values, decode)
        return ours()

    want = ours()
    found: dict[str, float | str] = {
        "ours_ms": measured_ms(shape, ours),
        "ours_with_writing_ms": measured_ms(shape, ours_with_writing),
        **alternatives(shape, q_THD, cache, want),
    }
    floor_ms = shape.num_bytes / copy_rate * 1e3
    shares = {
        name.removesuffix("_ms") + "_share": floor_ms / ms
        for name, ms in found.items()
        if isinstance(ms, float)
    }
    return {**asdict(shape), "num_bytes": shape.num_bytes, "floor_ms": floor_ms, **found, **shares}


def rows(
    batches: tuple[int, ...] = BATCHES, contexts: tuple[int, ...] = CONTEXTS
) -> list[dict[str, Any]]:
    """Every case; up to 40 GB of memory at the longest context of the largest batch."""
    copy_rate = copy_bytes_per_s()
    found = []
    for batch in batches:
        for context in contexts:
            cache = new_cache(batch, context)
            for num_query in QUERIES:
                row = row_of(Shape(batch, context, num_query), cache, copy_rate)
                found.append(row)
                print(line(row), flush=True)
            del cache
            torch.cuda.empty_cache()
    return found


SWEPT = (
    (16, 2048, False), (16, 8192, False), (16, 8192, True), (64, 4096, True), (64, 2048, False),
    (1, 8192, False),
)  # fmt: skip
"""Batch, context, and whether lengths differ."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut a case into programs."""

    num_parts: int
    tiling: Tiling
    overlap: bool = False

    def __str__(self) -> str:
        t = self.tiling
        shown = f"parts {self.num_parts} tile {t.rows}x{t.keys} warps {t.num_warps}"
        return f"{shown} stages {t.num_stages}{' overlap' * self.overlap}"


def cuts(shape: Shape) -> list[Cut]:
    """The one in force first, and candidates."""
    num_rows = shape.num_query * HEADS // KV_HEADS
    tiling = choose_tiling(num_rows, DIM, element_size=2)
    tiles = KV_HEADS * -(-num_rows // tiling.rows)
    in_force = attention_triton.parts_of(shape.batch, tiles, shape.context)
    tiling = choose_tiling(num_rows, DIM, 2, shape.batch * tiles * in_force)
    full = 132 * 2 // (shape.batch * tiles)
    fewest = min(in_force, -(-128 // (shape.batch * tiles)))  # else most of the card is idle
    parts = [in_force, *(p for p in (fewest, full, 2 * in_force) if fewest <= p <= 64)]
    found = [Cut(p, tiling, overlap) for p in parts for overlap in (False, True)]
    tilings = [
        replace(tiling, num_stages=2),
        replace(tiling, num_stages=3),
        replace(tiling, keys=128, num_warps=8, num_stages=3),
    ]
    found += [Cut(p, t) for t in tilings for p in dict.fromkeys(parts) if p <= in_force]
    return [cut for cut in dict.fromkeys(found) if cut.num_parts > 1 or not cut.overlap]


def sweep(budget_s: float) -> list[dict[str, Any]]:
    """Milliseconds of every way to cut some cases; stops starting cases after ``budget_s``."""
    started = time.perf_counter()
    copy_rate = copy_bytes_per_s(1 << 30)
    found = []
    for batch, context, is_ragged in SWEPT:
        cache = new_cache(batch, context)
        for num_query in QUERIES:
            shape = Shape(batch, context, num_query, is_ragged)
            if time.perf_counter() - started > budget_s:
                found.append({**asdict(shape), "skipped": f"after {budget_s:.0f} s"})
                continue
            found.append(swept(shape, cache, copy_rate))
            print(swept_line(found[-1]), flush=True)
        del cache
        torch.cuda.empty_cache()
    return found


def swept(shape: Shape, cache: Cache, copy_rate: float) -> dict[str, Any]:
    """All ways to cut one case, the fastest first."""
    num_rows = shape.batch * shape.num_query
    q_THD = torch.randn(num_rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    first_R = torch.tensor(shape.lengths, device="cuda").int() - shape.num_query
    decode = DecodePass(cache.pages_RP, first_R, PAGE)

    def work(cut: Cut) -> Tensor:
        return attention_triton.attend_pages(
            q_THD, cache.keys, cache.values, decode, SCALE,
            num_parts=cut.num_parts, tiling=cut.tiling, overlap=cut.overlap,
        )  # fmt: skip

    ways = cuts(shape)
    want = work(ways[0])
    timed = [(str(cut), guarded_ms(shape, lambda c=cut: partial(work, c), want)) for cut in ways]
    order = sorted(timed, key=lambda t: t[1] if isinstance(t[1], float) else float("inf"))
    floor_ms = shape.num_bytes / copy_rate * 1e3
    return {
        **asdict(shape),
        "floor_ms": floor_ms,
        "in_force_ms": timed[0][1],
        "cuts": [{"cut": name, "ms": ms} for name, ms in order],
    }


def swept_line(row: dict[str, Any]) -> str:
    """One swept case for a terminal."""

    def shown(ms: float | str) -> str:
        return f"{ms:.4f} ({row['floor_ms'] / ms:.0%})" if isinstance(ms, float) else ms[:60]

    best = "; ".join(f"{shown(c['ms'])} {c['cut']}" for c in row["cuts"][:5])
    case = f"B={row['batch']:<3} S={row['context']:<6} Q={row['num_query']:<3}"
    case += " ragged" if row["is_ragged"] else ""
    return f"{case} in force {shown(row['in_force_ms'])} | {best}"


def line(row: dict[str, Any]) -> str:
    """One row for a terminal: milliseconds and shares of the copy's bandwidth."""
    ours_gb_per_s = row["num_bytes"] / row["ours_ms"] / 1e6
    case = f"B={row['batch']:<3} S={row['context']:<6} Q={row['num_query']:<3}"
    cells = [f"floor {row['floor_ms']:.4f}", f"ours {ours_gb_per_s:.0f} GB/s"]
    for name, value in row.items():
        if not name.endswith("_ms") or name == "floor_ms":
            continue
        short = name.removesuffix("_ms")
        if isinstance(value, float):
            cells.append(f"{short} {value:.4f} ({row[short + '_share']:.0%})")
        else:
            cells.append(f"{short} {value[:60]}")
    return case + " | ".join(cells)


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/ops_attention.json"
    ),
    find_cuts: Annotated[bool, typer.Option("--sweep", help="try ways to cut some cases")] = False,
    budget_s: Annotated[float, typer.Option(help="of a sweep")] = 90.0,
) -> None:
    """All batches, contexts and numbers of query rows."""
    torch.manual_seed(0)
    if find_cuts:
        write_result(out.with_stem(out.stem + "_sweep"), {"rows": sweep(budget_s)})
    else:
        write_result(out, {"rows": rows()})


if __name__ == "__main__":
    typer.run(main)
