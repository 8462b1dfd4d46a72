"""Our engine against what a PyTorch user would run instead: same target, prompts, run and GPU.

    python -m benchmarks.peers --target FOLDER --drafter FOLDER
    python -m benchmarks.peers --shape Qwen3-8B       # random weights, decoding alone
    python -m benchmarks.peers --drafter examples/drafter/0 --no-compile --batches 1,2 \\
        --num-prompt 32 --num-new 8                   # everything on a CPU, in a minute

Prompts are held-out Python code cut to one length, so that no decoder pads; answers are greedy, of
a fixed number of tokens, and ignore end-of-text. Every decoder of ``make_decoders`` is opened and
warmed up for each batch size (``prepare_s``, part of no speed) and then alternates with the others;
every turn has prompts of its own. Each turn is answered in full, the first two also for the first
token alone: ``tokens_per_s`` counts whole requests, ``decode_tokens_per_s`` what follows the first
token, by the difference of the two. ``equal_tokens`` and ``equal_prompts`` are the shares equal to
our plain answers, counting tokens up to the first difference: bfloat16 rounds ties differently in
batches of other shapes. ``times_faster`` is our speed over the peer's on whole requests.

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
from benchmarks.harness.results import write_result
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
from targets.load import load_model, load_tokenizer, pick_device, pick_dtype

OURS = "ours, off"
FIRST_TURNS = 2
"""Turns for the first token alone; they vary less than whole answers."""
CHARS_PER_TOKEN = 6
"""More than tokenizers of code need, so that nearly every prompt is long enough to be cut."""


@dataclass(slots=True)
class Row:
    """One decoder at one batch size."""

    way: str
    batch: int
    about: str
    prepare_s: float | None = None
    """Opening and warming up: compilation, capture, allocation. Our engines are built once, for the
    largest batch, in the row that is first to use each."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    first_seconds: list[float] = field(default_factory=list)
    """Seconds of each turn for the first token alone."""
    answers: list[Ids] = field(default_factory=list)
    error: str | None = None

    def figures(self, num_new: int, plain: Row | None) -> dict[str, Any]:
        """The row as written; ``plain`` is our own without speculation."""
        found: dict[str, Any] = {
            "way": self.way,
            "batch": self.batch,
            "about": self.about,
            "prepare_s": self.prepare_s,
            "num_turns": len(self.seconds),
        }
        if self.seconds:
            whole = statistics.median(self.seconds)
            found["tokens_per_s"] = self.batch * num_new / whole
            found["seconds"] = self.seconds
            if self.first_seconds:
                first = statistics.median(self.first_seconds)
                found["first_token_s"] = first
                found["decode_tokens_per_s"] = decode_speed(self.batch, num_new, whole, first)
            if plain is not None and plain.answers:
                found |= agreement(plain.answers, self.answers)
        if self.error is not None:
            found["error"] = self.error
        return found


def decode_speed(batch: int, num_new: int, whole_s: float, first_s: float) -> float | None:
    """Tokens/s after the first token; ``None`` where noise hides the decoding."""
    if num_new < 2 or whole_s <= first_s:
        return None
    return batch * (num_new - 1) / (whole_s - first_s)


def agreement(plain: Sequence[Ids], other: Sequence[Ids]) -> dict[str, float]:
    """Shares of answers that are equal, and of tokens before the first difference, over the turns
    that both took."""
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


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peers' rows with how many times faster each of our decoders answers whole requests, at the
    same batch size."""
    ours: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["way"].startswith("ours") and "tokens_per_s" in row:
            ours.setdefault(row["batch"], {})[row["way"]] = row["tokens_per_s"]
    return [
        row
        if row["way"].startswith("ours") or "tokens_per_s" not in row
        else row
        | {
            "times_faster": {
                way: speed / row["tokens_per_s"]
                for way, speed in ours.get(row["batch"], {}).items()
            }
        }
        for row in rows
    ]


# Prompts


def prompt_sets(tokenizer: Any, num_sets: int, batch: int, num_prompt: int) -> list[Ids]:
    """Sets of ``batch`` held-out beginnings of Python code, ``num_prompt`` tokens each.

    Raises:
        ValueError: too few of them are as long.
    """
    wanted, chars = num_sets * batch, num_prompt * CHARS_PER_TOKEN
    texts = corpus.prompts("python", wanted + wanted // 4 + 4, 11, chars, chars + 400)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"][:num_prompt] for t in texts]
    long = [i for i in ids if len(i) == num_prompt][:wanted]
    if len(long) < wanted:
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts have {num_prompt} tokens of this tokenizer, "
            f"{wanted} are needed; ask for shorter ones by --num-prompt"
        )
    return [long[start : start + batch] for start in range(0, wanted, batch)]


# Decoders

MakeDecoder = Callable[[], Decoder]


@dataclass(frozen=True, slots=True)
class Options:
    """What decoders are made from."""

    target: Path
    drafter: Path | None
    assistant: Path | None
    assistant_layers: int
    device: str
    largest: Work
    is_compiled: bool


def make_decoders(o: Options, stack: ExitStack) -> dict[str, MakeDecoder]:
    """All decoders by name; nothing is loaded before one is made and opened."""
    device = pick_device(o.device)

    @cache
    def plain() -> Built:
        return stack.enter_context(our_engine(o.target, None, o.largest, o.device))

    @cache
    def drafted() -> Built:
        if o.drafter is None:
            raise ValueError("no drafter was given: --drafter FOLDER")
        return stack.enter_context(our_engine(o.target, o.drafter, o.largest, o.device))

    @cache
    def peer() -> Any:
        return peer_model(o.target, device)

    @cache
    def paged() -> Any:
        return peer_model(o.target, device)

    @cache
    def assistant() -> tuple[Any, str]:
        if o.assistant is not None:
            model: Any = load_model(o.assistant, pick_dtype("auto", device), device)
            return model.eval(), f"assistant {o.assistant.name}"
        small = first_layers(peer(), o.assistant_layers)
        return small, f"assistant: the target's first {o.assistant_layers} layers, not trained"

    def generate(about: str, **options: Any) -> MakeDecoder:
        return lambda: Generate(peer(), about, **options)

    def continuous(about: str, **settings: Any) -> MakeDecoder:
        return lambda: Continuous(paged(), best_paged_attention(), about, **settings)

    compiled: dict[str, Any] = {"compile_config": compiled_once()} if o.is_compiled else {}
    how = "compiled, reduce-overhead" if o.is_compiled else "not compiled"
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
            drafted, FixedPolicy(LEARNED, 4), "the drafter, K = 4 always, capture on"
        ),
        "generate, eager": generate("dynamic cache"),
        "continuous": continuous("transformers' own choice"),
        "continuous, graphs": continuous("CUDA graphs, padded by one token", **graphs),
        "generate, lookup": generate("prompt_lookup_num_tokens=10", prompt_lookup_num_tokens=10),
        "generate, assistant": lambda: Generate(
            peer(), assistant()[1], assistant_model=assistant()[0]
        ),
        "generate, MTP": generate("use_mtp", use_mtp=True),
        "generate, DFlash": lambda: Generate(
            peer(),
            "DFlash drafter of random weights: none was trained for this target",
            assistant_model=random_block_drafter(peer()),
            speculation_type="dflash",
        ),
        # What follows is compiled for each batch size, for up to a minute.
        "loop": lambda: Loop(peer(), o.is_compiled),
        "generate, static": generate(
            f"StaticCache kept between calls, {how}",
            past_key_values=lambda work: static_cache(peer())(work),
            **compiled,
        ),
    }
    return made


# Turns


class Table:
    """All rows so far; written after every change."""

    def __init__(self, out: Path, about: dict[str, Any], num_new: int) -> None:
        self.rows: list[Row] = []
        self._out = out
        self._about = about
        self._num_new = num_new

    def save(self) -> None:
        plain = {row.batch: row for row in self.rows if row.way == OURS}
        figures = [row.figures(self._num_new, plain.get(row.batch)) for row in self.rows]
        write_result(self._out, {**self._about, "rows": with_ratios(figures)})

    def line(self, row: Row) -> str:
        found = row.figures(self._num_new, None)
        whole, decode = found.get("tokens_per_s"), found.get("decode_tokens_per_s")
        shown = [f"{row.way:>22}, batch {row.batch:>2}"]
        shown += [f"prepared in {row.prepare_s:.1f} s"] if row.prepare_s is not None else []
        shown += [f"{whole:,.0f} tokens/s"] if whole is not None else []
        shown += [f"decoding {decode:,.0f}"] if decode is not None else []
        shown += [f"error: {row.error}"] if row.error is not None else []
        return ", ".join(shown)


def attempt(row: Row, work: Callable[[], None]) -> bool:
    """Call ``work``; an error becomes the row's result, and the run goes on."""
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
        if len(row.first_seconds) < FIRST_TURNS:
            first, _ = seconds_of(lambda: decoder.generate(sets[number], 1), device)
            row.first_seconds.append(first)

    def begin(row: Row, make_decoder: MakeDecoder) -> None:
        started = time.perf_counter()
        decoder = make_decoder()
        row.about = decoder.about
        try:
            decoder.open(work)
            row.about = decoder.about
            num = (
                work.num_new
                if decoder.num_warm_up is None
                else min(decoder.num_warm_up, work.num_new)
            )
            decoder.generate(warm_up, num)
            decoder.generate(warm_up, 1)
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
            row.error = "skipped: the budget of this batch size was spent"
        else:
            attempt(row, partial(begin, row, make_decoder))
        print(table.line(row), flush=True)
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
        print(table.line(row), flush=True)
    table.save()
    torch.compiler.reset()  # frees what compiled and captured functions hold
    release(device)


def chosen_decoders(make: dict[str, MakeDecoder], names: str) -> dict[str, MakeDecoder]:
    """The named decoders; our plain one always comes first, since others are compared with it.

    Raises:
        ValueError: no decoder has that name.
    """
    if names == "all":
        return make
    wanted = [name.strip() for name in names.split(";")]
    unknown = [name for name in wanted if name not in make]
    if unknown:
        raise ValueError(f"no decoder is called {unknown[0]!r}; known: {'; '.join(make)}")
    return {name: make[name] for name in (OURS, *wanted)}


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")] = Path("examples/target"),
    drafter: Annotated[Path | None, typer.Option(help="folder of a drafter bundle")] = None,
    assistant: Annotated[Path | None, typer.Option(help="folder of a small model")] = None,
    assistant_layers: Annotated[int, typer.Option(help="without one: of the target itself")] = 4,
    shape: Annotated[str | None, typer.Option(help="random weights of this shape instead")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    decoders: Annotated[str, typer.Option(help="separated by semicolons, or all")] = "all",
    batches: Annotated[str, typer.Option(help="by commas")] = "1,8,32",
    cells: Annotated[str, typer.Option(help="with --shape: batch x context")] = "1x1024,32x2048",
    num_prompt: int = 256,
    num_new: int = 128,
    turns: int = 3,
    budget_s: Annotated[float, typer.Option(help="decoders are skipped when it is spent")] = 240.0,
    decoder_s: Annotated[float, typer.Option(help="turns of one decoder at one batch size")] = 9.0,
    device: str = "auto",
    compile_: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Compare, and write the table."""
    if shape is not None:
        out = out or Path("benchmarks/results/peers_shape.json")
        compare_steps(shape, cells, decoders, num_new, turns, budget_s, device, compile_, out)
        return
    out = out or Path("benchmarks/results/peers.json")
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
    options = Options(target, drafter, assistant, assistant_layers, device, largest, compile_)
    with ExitStack() as stack:
        make = chosen_decoders(make_decoders(options, stack), decoders)
        for index, size in enumerate(sizes):
            prompts = prompt_sets(tokenizer, turns + 1, size, num_prompt)
            now = time.monotonic()
            # The first size builds our engines, and only that size allows assisted decoders.
            num_shares = len(sizes) - index + (index == 0)
            share_s = (begin_s + budget_s - now) / num_shares * (2 if index == 0 else 1)
            work = Work(size, num_prompt, num_new)
            compare(make, work, prompts, turns, on, table, now + share_s, decoder_s)
    print(f"{time.monotonic() - begin_s:.0f} s in all", flush=True)


if __name__ == "__main__":
    typer.run(main)
