"""Drafts from text inside a round: the index on the device, with a full ring.

    python -m benchmarks.ops.matches         # some seconds on one GPU

R requests of 500 tokens look for their last tokens in their own text and in 400,000 tokens of
finished ones. Words come as often as the n-th of a language does, each by itself, so that common
ones match in many places; or they are those of this repository's prose and code, whose pairs are
more frequent by far. Beside them, requests that are searched alone, and the part of a step that
this is: of SmolLM2-135M's plain step and of an 8B target's.

Writes ``benchmarks/results/ops_matches.json`` after every row, and ``rows/ops_matches.json``.

    python -m benchmarks.ops.matches --quick --against before.py

compares ways to share the search out to programs, each named by its ``Programs``, and another
version of ``specops.matches_triton`` if there is a file with one. Writes ``--out`` alone.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, Row, at_most, write_each, write_rows
from benchmarks.ops.place import Device, Place, make_place, reason
from specops import matches_triton
from specops.device import text_drafts
from specops.matches import BLOCK, END, Bounds, RingText, TextDrafts
from specops.matches_triton import Programs

Find = Callable[..., TextDrafts]
K, BOUNDS = 4, Bounds(2, 12)
SIZES = (1, 8, 32, 128, 256)
QUICK_SIZES = (1, 8, 32, 64, 128)
RING_TOKENS, OWN_TOKENS, FINISHED_TOKENS, VOCAB = 400_000, 500, 300, 49_152
LANE_TOKENS = 4_096
RING_FILES = ("docs/*.md", "serving/**/*.py", "trainer/**/*.py", "drafters/**/*.py")
REQUEST_FILES = ("tests/**/*.py", "benchmarks/**/*.py")
WAYS = (
    "8x2048x16 8x512x4 8x512x4x80 16x1024x8 16x512x4 16x512x4x96 16x512x4x128x66 16x256x2 32x512x4"
)
"""Each a ``Programs``, its numbers in order."""
SMALL_STEP_US = {32: 1_150.0, 128: 2_700.0}
"""A plain step of SmolLM2-135M through HTTP on an H200 (benchmarks/results/floor.json)."""
LARGE_STEP_US = 4_000.0
"""One of an 8B target in bfloat16 at least: it reads its weights once, at the speed of a copy."""


def words(generator: torch.Generator, num: int) -> Tensor:
    """[num] int32 tokens of which the n-th is drawn about in proportion to 1 / n."""
    drawn = torch.rand(num, generator=generator, device=generator.device)
    return (VOCAB**drawn - 1).int()


def uniform(generator: torch.Generator, num: int) -> Tensor:
    """[num] int32 tokens, all equally often."""
    return torch.randint(
        VOCAB, (num,), dtype=torch.int32, generator=generator, device=generator.device
    )


def repository(patterns: tuple[str, ...], ids: dict[str, int], num: int) -> Tensor:
    """[num] int32 tokens of this repository's files: words with the space before them, marks, and
    line ends with the indentation behind them.

    Args:
        ids: of known tokens; new ones are added.
    """
    files = [path for pattern in patterns for path in sorted(Path().glob(pattern))]
    found: list[int] = []
    for path in files:
        for word in re.findall(r"\n *| ?\w+| ?[^\w\s]|\s", path.read_text()):
            found.append(ids.setdefault(word, len(ids)))
        found.extend([ids.setdefault("", len(ids))])  # the end of a file
    return torch.tensor((found * -(-num // len(found)))[:num], dtype=torch.int32)


def ring_of(ids_T: Tensor) -> RingText:
    """Finished texts of one namespace, one after the other, cut from a long one."""
    each = -(-FINISHED_TOKENS // BLOCK) * BLOCK
    num_blocks = RING_TOKENS // BLOCK
    ids = ids_T[: num_blocks * BLOCK].clone()
    ids[torch.arange(len(ids), device=ids.device) % each >= FINISHED_TOKENS] = END
    bounds = torch.tensor([0, len(ids)], device=ids.device)
    return RingText(ids, torch.ones(num_blocks, dtype=torch.int32, device=ids.device), bounds)


def texts_of(ids_T: Tensor, size: int) -> Tensor:
    """[size, LANE_TOKENS] int32 lanes of requests that are somewhere in a long text."""
    lanes = torch.full((size, LANE_TOKENS), END, dtype=torch.int32, device=ids_T.device)
    starts = torch.arange(size, device=ids_T.device) * ((len(ids_T) - OWN_TOKENS) // size)
    own = torch.arange(OWN_TOKENS, device=ids_T.device)
    lanes[:, :OWN_TOKENS] = ids_T[starts[:, None] + own]
    return lanes


def sources(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """For each kind of text, the tokens of the ring and those that requests are cut from."""
    some = torch.Generator(device).manual_seed(0)
    most, ids = max(SIZES) * OWN_TOKENS, dict[str, int]()
    ring = repository(RING_FILES, ids, RING_TOKENS).to(device)
    own = repository(REQUEST_FILES, ids, 2 * most).to(device)
    return {
        "words": (words(some, RING_TOKENS), words(some, most)),
        "prose and code": (ring, own),
        "uniform": (uniform(some, RING_TOKENS), uniform(some, most)),
    }


def search(texts_LN: Tensor, ring: RingText | None, find: Find) -> Callable[[], TextDrafts]:
    """What drafts for the requests of all lanes."""
    size, device = len(texts_LN), texts_LN.device
    lanes = torch.arange(size, dtype=torch.int32, device=device)
    lengths = torch.full((size,), OWN_TOKENS, device=device)
    return partial(find, texts_LN, lanes, lengths, torch.ones_like(lengths), ring, K, BOUNDS)


def rows(place: Place) -> Iterator[dict[str, Any]]:
    """All sizes, with and without the ring, while time is left."""
    texts = sources(place.device)
    rings = {name: ring_of(ring) for name, (ring, _) in texts.items()}
    cases = [
        ("both texts", "words", rings["words"]),
        ("the request alone", "words", None),
        ("both texts, prose and code", "prose and code", rings["prose and code"]),
    ]
    for size in SIZES:
        for variant, name, ring in cases:
            if time.perf_counter() > place.deadline_s:
                return
            work = search(texts_of(texts[name][1], size), ring, text_drafts)
            matched = work().matched_R
            yield {
                "variant": variant,
                "requests": size,
                "with_match": float((matched != 0).float().mean()),
                "us": place.microseconds(work),
            }


def module_of(path: Path) -> Find:
    """``text_drafts`` of another version of ``specops.matches_triton``."""
    spec = importlib.util.spec_from_file_location("matches_before", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Find = module.text_drafts
    return found


def ways_of(names: str, against: Path | None) -> dict[str, Find]:
    """What is compared: the other version, what the number of requests decides, and each way."""
    found = {} if against is None else {"before": module_of(against)}
    found["chosen"] = matches_triton.text_drafts
    for name in names.split():
        programs = Programs(*map(int, name.split("x")))
        found[name] = partial(matches_triton.text_drafts, programs=programs)
    return found


def compared(place: Place, ways: dict[str, Find]) -> Iterator[dict[str, Any]]:
    """For each kind of text and number of requests: microseconds of all ways, whether their drafts
    differ from those of the first, while time is left."""
    for name, (ring_T, own_T) in sources(place.device).items():
        ring = ring_of(ring_T)
        for size in QUICK_SIZES:
            row: dict[str, Any] = {"text": name, "requests": size, "differ": []}
            want: Tensor | None = None
            for way, find in ways.items():
                if time.perf_counter() > place.deadline_s:
                    return
                work = search(texts_of(own_T, size), ring, find)
                try:
                    found = work()
                    got = torch.cat([found.tokens_RK.flatten(), found.counts_R, found.matched_R])
                    want = got if want is None else want
                    if not torch.equal(got, want):
                        row["differ"].append(way)
                    row["with_match"] = float((found.matched_R != 0).float().mean())
                    row[way] = round(place.microseconds(work), 1)
                except Exception as error:  # why a way cannot run is its result
                    row[way] = reason(error)
            yield row


def claims(found: list[dict[str, Any]]) -> list[Row]:
    """Shares of a step, with their goals."""
    made = []
    for row in found:
        what = f"index on the device, {row['requests']} requests, K = {K}, "
        what += f"{RING_TOKENS:,} recent tokens, {row['variant']}"
        made.append(Row(what, "microseconds of a round, in a CUDA graph", row["us"], None, None))
        small_us = SMALL_STEP_US.get(row["requests"])
        if small_us is not None and row["variant"] != "the request alone":
            share = row["us"] / small_us
            made.append(at_most(what, f"share of a 135M step of {small_us:g} us", share, 0.10))
            share = row["us"] / LARGE_STEP_US
            made.append(at_most(what, f"share of an 8B step of {LARGE_STEP_US:g} us", share, 0.03))
    return made


def main(
    out: Out = RESULTS / "ops_matches.json",
    device: Device = "cuda",
    budget_s: Annotated[float, typer.Option(help="no row starts after this")] = 60.0,
    quick: Annotated[bool, typer.Option(help="compare ways; needs another --out")] = False,
    ways: Annotated[
        str, typer.Option(help="with --quick: GROUPxSPANxWARPS[xREGISTERS[xPARTS]] …")
    ] = WAYS,
    against: Annotated[
        Path | None, typer.Option(exists=True, help="with --quick: another matches_triton.py")
    ] = None,
) -> None:
    """Measure all variants and print a line for each."""
    if quick and out == RESULTS / "ops_matches.json":
        raise typer.BadParameter(
            "it would overwrite the published figures; name another file", param_hint="--out"
        )
    place = make_place(device, budget_s)
    if quick:
        write_each(out, compared(place, ways_of(ways, against)))
        return
    found: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for row in rows(place):
            found.append(row)
            yield row

    write_each(out, kept())
    write_rows("ops_matches", claims(found), "python -m benchmarks.ops.matches", out.parent)


if __name__ == "__main__":
    typer.run(main)
