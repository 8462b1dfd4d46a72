"""Our engine against the authors' own code of EAGLE-3 and DFlash: same weights, same prompts.

    python -m benchmarks.peers.authors --eagle CHECKOUT --dflash CHECKOUT --run-dir runs/authors
    ... --eagle CHECKOUT --drafter examples/drafter/0 --set target=examples/target --device cpu

``CHECKOUT`` is a copy of SafeAILab/EAGLE or z-lab/dflash that you have; nothing of theirs is part
of this repository (``authors_code.py`` says how it is run). A drafter is trained on the target's
own traces first, unless ``--drafter`` names a bundle, is exported as ``drafters export --format
hf`` does, and is loaded by their classes. Then both answer the same chat prompts greedily, one
request at a time, in turns whose order alternates: EAGLE drafts a chain of ``--eagle-draft``
tokens, DFlash ``--dflash-draft`` tokens, which is a block of one more.

A round's outcome does not depend on how fast it was computed, so ``tokens_per_step`` is exact:
completion tokens after the first over rounds, up to the end of each answer. In float32 texts and
rounds must be the same one by one; half precision breaks ties differently, after which an answer is
another text.

Writes ``peers_authors.json`` and ``rows/peers_authors.json`` in ``benchmarks/results``; figures of
kinds and dtypes that are not measured again stay.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import loops
from benchmarks.harness.engines import build, release, synchronize
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import RESULTS, Out, Row, known, say, write_result, write_rows
from benchmarks.peers.authors_code import Answer, Decoder, DFlashCode, Eagle, Ids, Loaded, ends_of
from benchmarks.real.choosing import (
    ARM_DOMAINS,
    TRAINED_AT,
    collecting_settings,
    prompt_ids,
    settings_for,
)
from benchmarks.real.drafters import train
from benchmarks.real.train_drafter import Ask, collect
from buffer.backends import open_backend
from buffer.bundles import Bundle, read_bundle
from configs.schema import Settings
from drafters.catalog import CATALOG
from drafters.formats.published import export, load_target_table
from examples.traffic.chat import chat_prompts
from policies.fixed import FixedPolicy
from policies.interface import Outcome
from serving.engine.loop import Engine
from serving.requests import Request, SamplingParams
from targets.find import target_folder
from targets.load import pick_dtype
from targets.tokenizer import load_tokenizer

SAME = 0.02
"""Largest relative difference of tokens per step."""
EAGLE, DFLASH = "eagle3", "dflash"
assert {EAGLE, DFLASH} <= CATALOG.keys()

DTYPES = ("float32", "bfloat16")
SOURCE = "python -m benchmarks.peers.authors"

MakeDecoder = Callable[[Loaded], Decoder]

# Ours


class Noted(PolicySwitch):
    """Notes what was kept in each round."""

    def __init__(self, own: FixedPolicy) -> None:
        super().__init__(own)
        self.accepted: list[int] = []

    def observe(self, outcome: Outcome) -> None:
        self.accepted += outcome.rows.num_accepted
        super().observe(outcome)


class Ours:
    """Our engine with one request in flight and a fixed K."""

    def __init__(self, settings: Settings, kind: str, num_draft: int) -> None:
        service, _ = build(settings)
        self._kinds = frozenset((kind,))
        self._noted = Noted(FixedPolicy(kind, num_draft, needs_match=False))
        self._engine = Engine(service.engine.parts, self._noted, None, lambda _kinds: self._noted)
        self._numbers = itertools.count()

    @torch.inference_mode()
    def answer(self, prompt: Ids, max_tokens: int) -> Answer:
        """Decode to the end, or ``max_tokens``."""
        self._noted.accepted.clear()
        found = loops.Answer()
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        name = f"peer-{next(self._numbers)}"
        request = Request(name, prompt, sampling, capture=False, drafters=self._kinds)
        self._engine.inbox.submit(request, found.take)
        while not found.is_over:
            self._engine.step()
        if found.error is not None:
            raise RuntimeError(f"{name} failed: {found.error}")
        return Answer(found.tokens, list(self._noted.accepted))

    def settle(self) -> None:
        """Let what is still in flight end."""
        loops.clear(self._engine)


# Comparing


@dataclass(slots=True)
class Side:
    """One of the two decoders."""

    decoder: Decoder
    answers: list[Answer] = field(default_factory=list)
    """Of each prompt, up to its end, of the first turn."""
    speeds: list[float] = field(default_factory=list)
    """Tokens per second of each turn over all prompts."""

    @property
    def tokens_per_step(self) -> float:
        """Completion tokens after the first, over rounds."""
        tokens = sum(len(one.tokens) - 1 for one in self.answers)
        return tokens / max(1, sum(len(one.accepted) for one in self.answers))


def take_turns(
    ours: Side,
    theirs: Side,
    prompts: Sequence[Ids],
    ends: frozenset[int],
    max_tokens: int,
    turns: int,
    until: float,
    device: torch.device,
) -> None:
    """Answer all prompts with both in each turn, prompt by prompt. No further prompt begins after
    ``until``, a time of the monotonic clock, but the first."""
    for side in (ours, theirs):  # whatever is done once is done here
        side.decoder.answer(prompts[0], min(max_tokens, 16))
    for turn in range(turns):
        spent = {id(ours): 0.0, id(theirs): 0.0}
        made = {id(ours): 0, id(theirs): 0}
        for number, prompt in enumerate(prompts):
            if ours.answers and time.monotonic() > until:
                break
            both = (ours, theirs) if (turn + number) % 2 == 0 else (theirs, ours)
            for side in both:
                synchronize(device)
                started = time.perf_counter()
                whole = side.decoder.answer(prompt, max_tokens)
                synchronize(device)
                spent[id(side)] += time.perf_counter() - started
                made[id(side)] += len(whole.tokens)
                if turn == 0:
                    side.answers.append(whole.until(ends, max_tokens))
        for side in (ours, theirs):
            if made[id(side)]:
                side.speeds.append(made[id(side)] / spent[id(side)])


def figures_of(ours: Side, theirs: Side) -> dict[str, Any]:
    """What is published of one kind."""
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    ratios = [a / b for a, b in zip(ours.speeds, theirs.speeds, strict=True)]
    return {
        "prompts": len(pairs),
        "rounds": [sum(len(one.accepted) for one in side.answers) for side in (ours, theirs)],
        "tokens_per_step": ours.tokens_per_step,
        "their_tokens_per_step": theirs.tokens_per_step,
        "relative_difference": ours.tokens_per_step / theirs.tokens_per_step - 1,
        "equal_texts": sum(a.tokens == b.tokens for a, b in pairs) / len(pairs),
        "equal_rounds": sum(same_rounds(a, b) for a, b in pairs) / len(pairs),
        "tokens_per_s": statistics.median(ours.speeds),
        "their_tokens_per_s": statistics.median(theirs.speeds),
        "speed_ratio": statistics.median(ratios),
        "turns": len(ratios),
    }


def same_rounds(ours: Answer, theirs: Answer) -> bool:
    """Whether both kept the same in every round; the last one may be cut by the end."""
    return ours.accepted[:-1] == theirs.accepted[:-1] and len(ours.accepted) == len(theirs.accepted)


def claims(kinds: dict[str, Any]) -> list[Row]:
    """What the comparison must show."""
    rows = []
    for name, figures in kinds.items():
        about = f"{name}, K = {figures['draft_k']}"
        off, ratio = figures["relative_difference"], figures["speed_ratio"]
        rows += [
            Row(
                about, "tokens per step, ours over the authors' code, less 1", off,
                f"within {SAME:g}", abs(off) <= SAME,
            ),
            Row(about, "answers with the same text", figures["equal_texts"], None, None),
            Row(about, "answers with the same rounds", figures["equal_rounds"], None, None),
            Row(
                about, "tokens/s, ours over the authors' code", ratio, "above 1", ratio > 1,
            ),
        ]  # fmt: skip
    return rows


# Running


def trained_bundle(
    kind: str, run_dir: Path, device: str, asks: Sequence[Ask], spend: dict[str, float],
    batch: int, rows: int, chosen: Sequence[str],
) -> Bundle:  # fmt: skip
    """The newest version of a run, trained first if it has none."""
    settings = collecting_settings(run_dir, device, batch, f"drafter.kind={kind}", *chosen)
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    if not [version for version in store.versions() if version]:
        service, _ = build(settings)
        say(f"{kind}: collecting")
        found = collect(service, asks, 256, spend["collect"], batch, ends_early=True)
        del service
        release(torch.device(device))
        say(f"{kind}: {found['tokens']:,} tokens collected")
        train(settings, rows, spend["train"])
        release(torch.device(device))
    return store.read(max(store.versions()))


def compare(
    kind: str,
    bundle: Bundle,
    settings: Settings,
    theirs: MakeDecoder,
    num_draft: int,
    prompts: Sequence[Ids],
    max_tokens: int,
    turns: int,
    until: float,
) -> dict[str, Any]:
    """Both decoders with one drafter.

    Args:
        settings: of our engine, which begins with the weights of ``bundle``.
        theirs: makes the authors' decoder.
    """
    target = target_folder(settings.target, settings.target_cache)
    device = torch.device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    ends = ends_of(target)
    ours = Ours(settings, kind, num_draft)
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "published"
        export(bundle, "hf", load_target_table(settings.target, target), published)
        loaded = Loaded(target, published, Path(folder) / "target", dtype, device, num_draft, ends)
        peer = theirs(loaded)
        say(f"{kind}: both are loaded")
        sides = Side(ours), Side(peer)
        take_turns(*sides, prompts, ends, max_tokens, turns, until, device)
    ours.settle()
    name = str(dtype).removeprefix("torch.")
    return {"kind": kind, "draft_k": num_draft, "dtype": name, **figures_of(*sides)}


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the runs, one for each drafter")],
    eagle: Annotated[Path | None, typer.Option(help="checkout of SafeAILab/EAGLE")] = None,
    dflash: Annotated[Path | None, typer.Option(help="checkout of z-lab/dflash")] = None,
    drafter: Annotated[
        Path | None, typer.Option(help="bundle folder; one kind only; nothing is trained")
    ] = None,
    out: Out = RESULTS / "peers_authors.json",
    eagle_draft: Annotated[int, typer.Option(help="draft tokens of a chain")] = 4,
    dflash_draft: Annotated[int, typer.Option(help="draft tokens of a block")] = 15,
    dtypes: Annotated[str, typer.Option(help="comma-separated, of targets and drafters")] = (
        "bfloat16,float32"
    ),
    prompts: Annotated[int, typer.Option(help="of each of four domains")] = 8,
    max_tokens: int = 128,
    turns: Annotated[int, typer.Option(help="over all prompts, at most")] = 2,
    trained_on: Annotated[int, typer.Option(help="prompts of each domain to train on")] = 500,
    rows: Annotated[int, typer.Option(help="positions that a drafter is trained on")] = 2_000_000,
    collect_batch: Annotated[int, typer.Option(help="requests decoded at a time for traces")] = 128,
    collect_s: float = 8.0,
    train_s: Annotated[float, typer.Option(help="longest time of one drafter's updates")] = 20.0,
    budget_s: Annotated[float, typer.Option(help="no further prompt begins after so many")] = 240.0,
    device: str = "cuda",
    chosen: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of all engines, a.b=c")
    ] = None,
) -> None:
    """Compare, and write figures and rows."""
    began, more = time.monotonic(), chosen or []
    codes: dict[str, tuple[int, MakeDecoder]] = {}
    if eagle is not None:
        codes[EAGLE] = eagle_draft, partial(Eagle, eagle)
    if dflash is not None:
        codes[DFLASH] = dflash_draft, partial(DFlashCode, dflash)
    if not codes:
        raise typer.BadParameter("name a checkout: --eagle, --dflash or both")
    if drafter is not None and len(codes) != 1:
        raise typer.BadParameter("--drafter is of one kind: name one checkout")
    settings = settings_for(run_dir, device, *more)
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts + trained_on), seed=7, may_lack=True)
    ids = [[prompt_ids(tokenizer, one) for one in asked] for asked in found.values()]
    answered = [one for group in zip(*(a[:prompts] for a in ids), strict=False) for one in group]
    mixed = [one for group in zip(*(a[prompts:] for a in ids), strict=False) for one in group]
    asks = [Ask(one, TRAINED_AT) for one in mixed]
    figures: dict[str, Any] = json.loads(out.read_text())["kinds"] if out.exists() else {}
    left = [(kind, dtype) for kind in codes for dtype in known("dtypes", dtypes.split(","), DTYPES)]
    for place, (kind, dtype) in enumerate(left):
        num_draft, theirs = codes[kind]
        own = run_dir / kind
        if drafter is None:
            spend = {"collect": collect_s, "train": train_s}
            bundle = trained_bundle(kind, own, device, asks, spend, collect_batch, rows, more)
        else:
            bundle = read_bundle(drafter.resolve())
        engine = settings_for(
            own, device, f"drafter.kind={kind}", f"drafter.max_draft={num_draft}",
            "drafter.suffix.enabled=false", "drafter.on_request=null", "engine.max_batch=1",
            "engine.draft_at_start=null", "capture.enabled=false", f"dtype={dtype}", *more,
            *([] if drafter is None else [f"drafter.path={drafter}"]),
        )  # fmt: skip
        now = time.monotonic()
        until = now + (began + budget_s - now) / (len(left) - place)
        name = f"{kind}, {dtype}"
        figures[name] = compare(
            kind, bundle, engine, theirs, num_draft, answered, max_tokens, turns, until
        )
        release(torch.device(device))
        say(f"{name}: {figures[name]}")
        about = {"target": Path(settings.target).name, "max_tokens": max_tokens}
        write_result(out, {**about, "kinds": figures})
        write_rows("peers_authors", claims(figures), SOURCE, out.parent)
    say(f"done after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
