"""Bad candidates against the three lines behind each other: gate, load checks, live watch.

    python -m benchmarks.candidates                     # half an hour at most, on two cores
    python -m benchmarks.candidates --each 1 --draws 100 --minutes 5

A server decodes the bundled target with the bundled drafter, version 0, for four clients. Of each
bad kind, some candidates are made from version 0 (``kinds.py``): with a NaN, with a permuted
vocabulary, with tensors of another dtype, over-trained on four traces, and made better on another
domain but spoilt where that does not show, so that they pass the gate there and are bad at what is
served. Each is put to

- the **gate**, as the trainer asks it, and to the checks of ``publish``;
- the **load checks** of the server, planted in its store past both of them;
- the **live watch**, if it was loaded, under the same traffic, until it is rolled back or kept.

None may be kept, and none may draft longer than a watch with its trials and confirmations can take.
One swap is one draw, so those that drafted are then swapped in a thousand times in simulation, as
good ones are below.

Good ones must not be refused: version 0 again with rounding noise, and version 0 trained on
another domain, serving it. Some are swapped in live. Thousands of swaps are then simulated: the
server's own sequential test (``policies.rollback.SwapWatch``) gets the rounds of real requests,
drawn at random (``good.py``); and the gate is asked as often, with held-out traces that are drawn
again. An equal candidate does not pass the gate by intention; and whether a better one passes
depends on how much better it is, so the gain is said beside the count. One that is refused there is
not lost: training goes on, and the next one is judged.

Writes ``benchmarks/results/candidates.json`` and, with ``--publish``, ``rows/candidates.json``,
after each candidate, so that a run that is stopped leaves what it has found.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.candidates.good import gated, watched
from benchmarks.candidates.kinds import KINDS, MOST_UPDATES, Candidate, Known, NotMadeError
from benchmarks.candidates.world import CLIENTS, Live, Rounds, World, sequences, world
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from buffer.records import Trace
from policies.rollback import MAX_TRIALS
from trainer.rows import HeldSample

SOURCE = "python -m benchmarks.candidates"
HOME, AWAY = "python", "c"
JUDGED = 16
"""Held-out traces of each domain."""
_MORE_PLAYED = 64
"""Requests of each domain that version 0 decodes besides, for its rounds."""
LR = 3e-4
"""At which a better one is trained: on other text it gains 6 % in 20 updates; at 1e-3, nothing."""
GOOD = "good"
"""Stands for an equal and a better candidate among the kinds."""
MOST_WINDOWS = MAX_TRIALS + 1
"""A version drafts in the watching window and after each trial."""
_BLOCK = 16
NUM_DRAWN = 250
"""Simulated swaps of each bad one that drafted, for each seed."""
SEEDS = (4, 5, 6, 7)


def most_rounds(watch_rounds: int) -> int:
    """Rounds that a version can draft before the watch has decided: its windows, and what is left
    of a block and of a step at the end of each."""
    window = -(-watch_rounds // _BLOCK) * _BLOCK
    return MOST_WINDOWS * window + (MOST_WINDOWS + 1) * (_BLOCK + CLIENTS)


def tried(one: World, candidate: Candidate, known: Known) -> tuple[str | None, str | None, Live]:
    """What the gate says, why it is not published, and what becomes of it live."""
    gate = None
    if candidate.model is not None:
        gate = known.judged(candidate.model, candidate.judged_on).verdict.kind
    refusal = one.publish(candidate.tensors)
    live = one.offer(candidate.tensors, HOME)
    one.back_to_first()
    return gate, refusal, live


@dataclass(slots=True)
class Tally:
    """What became of the bad candidates of one kind."""

    results: list[tuple[str | None, str | None, Live]] = field(default_factory=list)
    not_made: list[str] = field(default_factory=list)
    drawn: list[dict[str, Any]] = field(default_factory=list)
    """Of ``watched``, for each one that drafted."""

    def to_json(self) -> dict[str, Any]:
        """Counts."""
        lives = [live for _, _, live in self.results]
        return {
            "candidates": len(self.results),
            "not_made": self.not_made,
            "gate": dict(Counter(gate or "not judged" for gate, _, _ in self.results)),
            "refused_by_publish": sum(refusal is not None for _, refusal, _ in self.results),
            "live": dict(Counter(live.outcome for live in lives)),
            "load_refusals": dict(Counter(live.reason for live in lives if live.reason)),
            "rounds": [live.rounds for live in lives],
            "tokens_per_step": [tokens_per_step(live.drafted) for live in lives],
            "drawn": self.drawn,
        }


def tokens_per_step(rounds: Rounds) -> float | None:
    """Of rounds of several requests; ``None`` for none."""
    kept = [accepted for request in rounds for _, accepted in request]
    return 1 + fmean(kept) if kept else None


def try_bad(one: World, known: Known, name: str, seed: int, tally: Tally) -> None:
    """One candidate of a kind."""
    began_s = time.monotonic()
    try:
        candidate = KINDS[name](one, known, seed)
    except NotMadeError as error:
        tally.not_made.append(str(error))
        say(f"{name}: not made: {error}")
        return
    made_s = time.monotonic() - began_s
    tally.results.append(tried(one, candidate, known))
    if drafted := tally.results[-1][2].drafted:
        swap = one.settings.swap
        home = known.rounds["home"]
        tally.drawn.append(
            watched(home, drafted, swap.watch_rounds, swap.max_drop, NUM_DRAWN, SEEDS)
            | {"lost": 1 - (tokens_per_step(drafted) or 0) / (tokens_per_step(home) or 1)}
        )
    seconds = time.monotonic() - began_s
    gate, refusal, live = tally.results[-1]
    say(f"{name}: {gate}, {refusal}, {live.outcome} after {live.rounds} rounds, "
        f"{tally.drawn[-1:] if live.drafted else live.reason}, {seconds:.0f} s, {made_s:.0f} of "
        f"them to make it")  # fmt: skip


def noisy(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same law, other bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (1 + 1e-6 * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def better_than_first(one: World, away: Sequence[HeldSample], known: Known) -> nn.Module | None:
    """Version 0, trained on the other domain until it passes the gate there with a gain of more
    than two hundredths; ``None``: it never did."""

    def passes(model: nn.Module) -> bool:
        found = known.judged(model, "away")
        say(f"away: {found.verdict.reason}")
        return found.verdict.passed and (found.candidate or 0) > 1.02 * (found.incumbent or 1)

    return one.trained(away, LR, MOST_UPDATES, passes, 0, averaged=True)


def try_good(one: World, known: Known, seed: int, lives: dict[str, list[Live]]) -> None:
    """One equal and, if there is one, one better candidate, served."""
    offers = {"equal": (one.tensors(), HOME)}
    if known.better is not None:
        offers["better"] = (one.tensors_of(known.better), AWAY)
    for name, (tensors, domain) in offers.items():
        live = one.offer(noisy(tensors, seed), domain)
        lives.setdefault(name, []).append(live)
        if name == "better" and not known.played and live.outcome == "kept":
            known.played.extend(sequences(one.play_requests(AWAY, JUDGED)))
        one.back_to_first()
        say(f"{name}: {live.outcome} after {live.rounds} rounds")


def drawn_gates(one: World, known: Known, draws: int) -> dict[str, Any]:
    """The gate on held-out traces drawn again and again."""
    if known.better is None:
        return {}
    held_out = known.judging["away"]
    return {
        f"better, {num} held-out traces": gated(one, known.better, held_out, num, draws, seed=3)
        for num in (one.settings.trainer.held_out_traces, 32)
    }


def counts_of(traces: Sequence[Trace], num_tokens: int) -> Tensor:
    """[num_tokens] int64: how often each token occurs in the completions."""
    ids = [torch.from_numpy(t.token_ids[t.prompt_length :].astype("int64")) for t in traces]
    return torch.bincount(torch.cat(ids), minlength=num_tokens)


def known_of(one: World) -> Known:
    """What trainers of candidates know: traces of both domains, and a better drafter."""
    name_of = {"home": HOME, "away": AWAY}
    traces = {"home": one.play_requests(HOME, 2 * JUDGED)}
    traces["away"] = one.play_requests(AWAY, 3 * JUDGED)
    held = {name: one.hold(found) for name, found in traces.items()}
    num_tokens = int(one.manifest.drafter_config["target_vocab_size"])
    known = Known(
        held["home"][JUDGED:],
        held["away"][JUDGED:],
        {name: samples[:JUDGED] for name, samples in held.items()},
        {name: one.judge(one.model()) for name in held},
        {name: counts_of(found, num_tokens) for name, found in traces.items()},
        {
            # Of a few dozen requests alone, tokens_per_step is uncertain by a tenth.
            name: sequences([*found, *one.play_requests(name_of[name], _MORE_PLAYED)])
            for name, found in traces.items()
        },
        None,
    )
    return replace(known, better=better_than_first(one, known.away, known))


def measure(each: int, draws: int, seed: int, minutes: float) -> Iterator[dict[str, Any]]:
    """All of it, in a folder of its own, one candidate of each kind after the other, again and
    again; yields all figures so far after each.

    Args:
        minutes: after which no other candidate is begun.
    """
    torch.set_num_threads(1)
    began_s = time.monotonic()
    bad = {name: Tally() for name in KINDS}
    lives: dict[str, list[Live]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="candidates-") as folder,
        world((HOME, AWAY), seed, Path(folder)) as one,
    ):
        known = known_of(one)
        say(f"a better one: {known.better is not None}, {time.monotonic() - began_s:.0f} s")
        watch = one.settings.swap.watch_rounds, one.settings.swap.max_drop
        home, away = known.rounds["home"], known.rounds["away"]
        swaps = {"equal": watched(home, home, *watch, draws, SEEDS)}
        swaps["equal, on other text"] = watched(away, away, *watch, draws, SEEDS)
        gates = drawn_gates(one, known, draws)
        for number, name in itertools.product(range(each), (*KINDS, GOOD)):
            if time.monotonic() - began_s > 60 * minutes:
                return
            if name == GOOD:
                try_good(one, known, number, lives)
                if known.played and "better" not in swaps:
                    swaps["better"] = watched(away, known.played, *watch, draws, SEEDS)
            else:
                try_bad(one, known, name, number, bad[name])
            yield {
                "bad": {name: tally.to_json() for name, tally in bad.items()},
                "good": {
                    "live": {n: dict(Counter(x.outcome for x in f)) for n, f in lives.items()},
                    "watch": swaps,
                    "gate": gates,
                },
                "most_rounds": most_rounds(watch[0]),
                "seconds": time.monotonic() - began_s,
                "load": os.getloadavg()[1],
                "seed": seed,
            }


def rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    bad, good = found["bad"], found["good"]
    for name, one in bad.items():
        what = f"{one['candidates']} candidates: {name}"
        yield at_least(what, "candidates made", one["candidates"], 1)
        yield at_most(what, "kept in service", one["live"].get("kept", 0), 0)
        longest = f"most rounds that one drafted ({found['most_rounds']} are those of a watch)"
        yield at_most(what, longest, max(one["rounds"], default=None), found["most_rounds"])
        for drawn in one.get("drawn", ()):
            swaps = f"{drawn['swaps']} swaps drawn from real requests: {name}"
            lost = f"kept, of 1,000, with {100 * drawn['lost']:.0f} % of tokens_per_step lost"
            kept = drawn["swaps"] - drawn["rolled_back"]
            yield at_most(swaps, lost, 1000 * kept / drawn["swaps"], 0)
    for name, one in good["watch"].items():
        what = f"{one['swaps']} good candidates drawn from real requests: {name}"
        yield at_most(what, "rolled back, of 1,000", 1000 * one["rolled_back"] / one["swaps"], 1)
    for name, lives in good["live"].items():
        what = f"{sum(lives.values())} good candidates swapped in live: {name}"
        yield at_most(what, "refused or rolled back", sum(lives.values()) - lives["kept"], 0)
    for name, one in good["gate"].items():
        what = f"{one['draws']} draws of held-out traces: {name}, {100 * one['gain']:.1f} % faster"
        yield Row(what, "refused by the gate, of 1,000", 1000 * one["refused"] / one["draws"],
                  None, None)  # fmt: skip


def failures(rows: Sequence[Row]) -> list[Row]:
    """Claims that do not hold."""
    return [row for row in rows if row.holds is False]


def main(
    each: Annotated[int, typer.Option(min=1, help="candidates of each kind, good ones too")] = 6,
    draws: Annotated[
        int, typer.Option(min=1, help="good ones drawn from real requests, for each of four seeds")
    ] = 1000,
    minutes: Annotated[
        float, typer.Option(min=0, help="after which no other candidate is begun")
    ] = 30.0,
    seed: int = 0,
    publish: Annotated[bool, typer.Option(help="write rows/candidates.json, too")] = False,
    out: Out = RESULTS / "candidates.json",
) -> None:
    """Offer bad and good candidates, and count what becomes of them."""
    rows: list[Row] = []
    for found in measure(each, draws, seed, minutes):
        write_result(out, found)
        rows = list(rows_of(found))
        if publish:
            write_rows("candidates", rows, SOURCE)
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if failures(rows):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
