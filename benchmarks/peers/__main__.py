"""Our engine against other decoders for PyTorch: same target, prompts, process and GPU.

    python -m benchmarks.peers --target FOLDER --drafter FOLDER
    python -m benchmarks.peers --shape Qwen3-8B       # random weights, decoding alone
    python -m benchmarks.peers --drafter examples/drafter/0 --no-compile --batches 1,2 \\
        --num-prompt 32 --num-new 8                   # everything on a CPU, in a minute

Prompts are held-out Python code cut to one length, so that no decoder pads; answers are greedy,
have a fixed number of tokens, and ignore end-of-text. Every decoder of ``make_decoders`` is opened
and warmed up for each batch size (``prepare_s``, not included in any speed) and then alternates
with the others; every turn has its own prompts. ``tokens_per_s`` covers whole requests.
``equal_prompts`` and ``equal_tokens`` are the shares that equal our plain answers, counting tokens
up to the first difference: bfloat16 rounds ties differently in batches of other shapes.

If a decoder cannot run, its row holds the error. Writes ``benchmarks/results/peers.json`` (with
``--shape``: ``peers_shape.json``, by ``benchmarks.peers.steps``) after every row.
"""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import Built, release
from benchmarks.harness.results import RESULTS, known, rounded, say, write_result
from benchmarks.peers.decoders import (
    Continuous,
    Decoder,
    Generate,
    Ids,
    Loop,
    Ours,
    Work,
    best_paged_attention,
    compiled_once,
    first_layers,
    our_engine,
    peer_model,
    random_block_drafter,
    seconds_of,
    static_cache,
)
from benchmarks.peers.steps import compare_steps
from examples import corpus
from policies.fixed import FixedPolicy
from targets.device import pick_device
from targets.load import pick_dtype
from targets.tokenizer import load_tokenizer

OURS = "ours, off"
ASSISTANT_LAYERS = 4
CHARS_PER_TOKEN = 6
"""More than a tokenizer needs for code, so that nearly every prompt is long enough to be cut."""


@dataclass(slots=True)
class Row:
    """One decoder at one batch size."""

    variant: str
    batch: int
    about: str
    prepare_s: float | None = None
    """Seconds to open and warm up: compilation, capture, allocation. Our engines are built once,
    for the largest batch, and counted in the first row that uses each."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    answers: list[Ids] = field(default_factory=list)
    error: str | None = None

    def figures(self, num_new: int, plain: Row | None) -> dict[str, Any]:
        """The row as written; ``plain`` is our own row without speculation."""
        found: dict[str, Any] = {
            "variant": self.variant,
            "batch": self.batch,
            "about": self.about,
            "prepare_s": self.prepare_s,
            "num_turns": len(self.seconds),
        }
        if self.seconds:
            found["tokens_per_s"] = self.batch * num_new / statistics.median(self.seconds)
            found["seconds"] = self.seconds
            if plain is not None and plain.answers:
                found |= agreement(plain.answers, self.answers)
        if self.error is not None:
            found["error"] = self.error
        return found


def agreement(plain: Sequence[Ids], other: Sequence[Ids]) -> dict[str, float]:
    """Shares of equal answers, and of tokens before the first difference, over the turns that both
    have taken."""
    pairs = [
        pair for ours, theirs in zip(plain, other, strict=False)
        for pair in zip(ours, theirs, strict=True)
    ]  # fmt: skip
    equal = [
        sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))
        for a, b in pairs
    ]
    return {
        "equal_prompts": sum(a == b for a, b in pairs) / len(pairs),
        "equal_tokens": sum(equal) / sum(len(a) for a, _ in pairs),
    }


# Prompts


def prompt_sets(tokenizer: Any, num_sets: int, batch: int, num_prompt: int) -> list[Ids]:
    """Sets of ``batch`` held-out Python prompts, ``num_prompt`` tokens each.

    Raises:
        ValueError: too few prompts are long enough.
    """
    wanted, chars = num_sets * batch, num_prompt * CHARS_PER_TOKEN
    texts = corpus.prompts("python", wanted + wanted // 4 + 4, 11, chars, chars + 400)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"][:num_prompt] for t in texts]
    long = [i for i in ids if len(i) == num_prompt][:wanted]
    if len(long) < wanted:
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts have {num_prompt} tokens with this tokenizer, "
            f"{wanted} are needed; ask for shorter ones with --num-prompt"
        )
    return [long[start : start + batch] for start in range(0, wanted, batch)]


# Decoders

MakeDecoder = Callable[[], Decoder]


def make_decoders(
    target: Path,
    drafter: Path | None,
    device: torch.device,
    largest: Work,
    is_compiled: bool,
    stack: ExitStack,
) -> dict[str, MakeDecoder]:
    """All decoders by name; nothing is loaded until a decoder is made and opened."""

    @cache
    def plain() -> Built:
        return stack.enter_context(our_engine(target, None, largest, str(device)))

    @cache
    def drafted() -> Built:
        if drafter is None:
            raise ValueError("no drafter was given: --drafter FOLDER")
        return stack.enter_context(our_engine(target, drafter, largest, str(device)))

    @cache
    def peer() -> Any:
        return peer_model(target, device)

    @cache
    def paged() -> Any:
        return peer_model(target, device)

    def generate(about: str, **options: Any) -> MakeDecoder:
        return lambda: Generate(peer(), about, **options)

    def continuous(about: str, **settings: Any) -> MakeDecoder:
        return lambda: Continuous(paged(), best_paged_attention(), about, **settings)

    compiled: dict[str, Any] = {"compile_config": compiled_once()} if is_compiled else {}
    how = "compiled, reduce-overhead" if is_compiled else "not compiled"
    graphs = {
        "use_cuda_graph": True,
        "q_padding_interval_size": lambda work: work.batch,
        "kv_padding_interval_size": lambda work: work.batch * 64,
    }
    made: dict[str, MakeDecoder] = {
        OURS: lambda: Ours(plain, None, "the engine without speculation"),
        "ours, goodput": lambda: Ours(
            drafted, None, "drafter and index, K by the policy, capture on"
        ),
        "ours, K=4": lambda: Ours(
            drafted, FixedPolicy(LEARNED, 4), "the drafter, always K = 4, capture on"
        ),
        "generate, eager": generate("dynamic cache"),
        "continuous": continuous("transformers' own choice"),
        "continuous, graphs": continuous("CUDA graphs, padded by one token", **graphs),
        "generate, lookup": generate("prompt_lookup_num_tokens=10", prompt_lookup_num_tokens=10),
        "generate, assistant": lambda: Generate(
            peer(),
            f"assistant: the target's first {ASSISTANT_LAYERS} layers, not trained",
            assistant_model=first_layers(peer(), ASSISTANT_LAYERS),
        ),
        "generate, MTP": generate("use_mtp", use_mtp=True),
        "generate, DFlash": lambda: Generate(
            peer(),
            "DFlash drafter with random weights: none was trained for this target",
            assistant_model=random_block_drafter(peer()),
            speculation_type="dflash",
        ),
        # The decoders below compile for each batch size, which takes up to a minute.
        "loop": lambda: Loop(peer(), is_compiled),
        "generate, static": generate(
            f"StaticCache kept between calls, {how}",
            past_key_values=lambda work: static_cache(peer())(work),
            **compiled,
        ),
    }
    return made


# Turns


class Table:
    """All rows so far; ``save`` writes them after every change."""

    def __init__(self, out: Path, about: dict[str, Any], num_new: int) -> None:
        self.rows: list[Row] = []
        self._out = out
        self._about = about
        self._num_new = num_new

    def save(self) -> None:
        plain = {row.batch: row for row in self.rows if row.variant == OURS}
        figures = [row.figures(self._num_new, plain.get(row.batch)) for row in self.rows]
        write_result(self._out, {**self._about, "rows": figures})


def attempt(row: Row, work: Callable[[], None]) -> bool:
    """Call ``work``; returns False and records the error in the row if it raises."""
    try:
        work()
    except Exception as error:  # whatever a peer raises is its result
        row.error = f"{type(error).__name__}: {str(error).strip()[:400]}"
        traceback.print_exc(limit=-3)
        return False
    return True


def compare(
    make: dict[str, MakeDecoder],
    work: Work,
    prompts: list[Ids],
    turns: int,
    device: torch.device,
    table: Table,
    deadline_s: float,
    decoder_s: float,
) -> None:
    """Measure all decoders at one batch size: open each for a first turn, then alternate."""
    warm_up, *sets = prompts
    living: list[tuple[Row, Decoder]] = []

    def turn(row: Row, decoder: Decoder, number: int) -> None:
        seconds, answers = seconds_of(lambda: decoder.generate(sets[number], work.num_new), device)
        wrong = {len(a) for a in answers} - {work.num_new}
        if wrong:
            raise RuntimeError(f"answers have {wrong} tokens, not {work.num_new}")
        row.seconds.append(seconds)
        row.answers.append(answers)

    def begin(row: Row, make_decoder: MakeDecoder) -> None:
        started = time.perf_counter()
        decoder = make_decoder()
        row.about = decoder.about
        try:
            decoder.open(work)
            row.about = decoder.about
            decoder.generate(warm_up, min(decoder.num_warm_up or work.num_new, work.num_new))
            row.prepare_s = time.perf_counter() - started
            turn(row, decoder, 0)
        except BaseException:
            decoder.close()
            raise
        living.append((row, decoder))

    for name, make_decoder in make.items():
        row = Row(name, work.batch, "")
        table.rows.append(row)
        if time.monotonic() > deadline_s:
            row.error = "skipped: the budget of this batch size is used up"
        else:
            attempt(row, partial(begin, row, make_decoder))
        say(str(rounded(row.figures(work.num_new, None))))
        table.save()
    for number in range(1, turns):
        for row, decoder in living:
            is_spent = (
                sum(row.seconds) + row.seconds[-1] > decoder_s or time.monotonic() > deadline_s
            )
            if row.error is None and not is_spent:
                attempt(row, partial(turn, row, decoder, number))
        table.save()
    for row, decoder in living:
        attempt(row, decoder.close)
        say(str(rounded(row.figures(work.num_new, None))))
    table.save()
    torch.compiler.reset()  # frees memory held by compiled and captured functions
    release(device)


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")] = Path("examples/target"),
    drafter: Annotated[Path | None, typer.Option(help="folder of a drafter bundle")] = None,
    shape: Annotated[str | None, typer.Option(help="random weights of this shape instead")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    decoders: Annotated[str, typer.Option(help="separated by semicolons, or all")] = "all",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,32",
    cells: Annotated[str, typer.Option(help="with --shape: BATCHxCONTEXT")] = "1x1024,32x2048",
    num_prompt: int = 256,
    num_new: int = 128,
    turns: int = 3,
    budget_s: Annotated[float, typer.Option(help="decoders are skipped after this")] = 240.0,
    decoder_s: Annotated[float, typer.Option(help="per decoder and batch size")] = 9.0,
    device: str = "auto",
    compile_: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Compare, and write the table."""
    if shape is not None:
        out = out or RESULTS / "peers_shape.json"
        compare_steps(shape, cells, decoders, num_new, turns, budget_s, device, compile_, out)
        return
    out = out or RESULTS / "peers.json"
    begin_s, sizes = time.monotonic(), [int(b) for b in batches.split(",")]
    on = pick_device(device)
    tokenizer = load_tokenizer(target)
    about = {
        "target": target.name,
        "drafter": drafter.name if drafter is not None else None,
        "dtype": str(pick_dtype("auto", on)).removeprefix("torch."),
        "num_prompt": num_prompt,
        "num_new": num_new,
        "compiled": compile_,
    }
    table = Table(out, about, num_new)
    largest = Work(max(sizes), num_prompt, num_new)
    with ExitStack() as stack:
        make = make_decoders(target, drafter, on, largest, compile_, stack)
        if decoders != "all":  # ours comes first: others are compared with it
            make = {
                name: make[name] for name in (OURS, *known("decoders", decoders.split(";"), make))
            }
        for index, size in enumerate(sizes):
            prompts = prompt_sets(tokenizer, turns + 1, size, num_prompt)
            now = time.monotonic()
            # Our engines are built in the first size, and assisted decoders run only at batch 1.
            num_shares = len(sizes) - index + (index == 0)
            share_s = (begin_s + budget_s - now) / num_shares * (2 if index == 0 else 1)
            work = Work(size, num_prompt, num_new)
            compare(make, work, prompts, turns, on, table, now + share_s, decoder_s)
    print(f"{time.monotonic() - begin_s:.0f} s in all", flush=True)


if __name__ == "__main__":
    typer.run(main)
