"""Bad candidates against the three lines behind each other: gate, load checks, live watch.

    python -m benchmarks.candidates                     # some ten minutes on two cores
    python -m benchmarks.candidates --each 1 --draws 100

A server decodes the bundled target with the bundled drafter, version 0, for four clients. Of each
bad kind, some candidates are made from version 0 (``kinds.py``): with a NaN, with a permuted
vocabulary, with tensors of another dtype, over-trained on four traces, and made better on another
domain but spoilt where that does not show, so that they pass the gate there and are bad at what is
served. Each is put to

- the **gate**, as the trainer asks it, and to the checks of ``publish``;
- the **load checks** of the server, planted in its store past both of them;
- the **live watch**, if it was loaded, under the same traffic, until it is rolled back or kept.

None may be kept, and none may draft longer than a watch with its trial and confirmation can take.

Good ones must not be refused: version 0 again with rounding noise, and version 0 trained on
another domain, serving it. Some are swapped in live. Thousands of swaps are then simulated: the
server's own sequential test (``policies.rollback.SwapWatch``) gets the rounds of real requests,
drawn at random (``good.py``); and the gate is asked as often, with held-out traces that are drawn
again. An equal candidate does not pass the gate by intention; and whether a better one passes
depends on how much better it is, so the gain is said beside the count. One that is refused there is
not lost: training goes on, and the next one is judged.

Writes ``benchmarks/results/candidates.json`` and, with ``--publish``, ``rows/candidates.json``.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.candidates.good import gated, watched
from benchmarks.candidates.kinds import KINDS, MOST_UPDATES, Candidate, Known, NotMadeError
from benchmarks.candidates.world import CLIENTS, Live, World, sequences, world
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
from trainer.rows import HeldSample

SOURCE = "python -m benchmarks.candidates"
HOME, AWAY = "python", "c"
JUDGED = 16
"""Held-out traces of each domain."""
LR = 3e-4
"""At which a better one is trained: on other text it gains 6 % in 20 updates; at 1e-3, nothing."""
REQUESTS = 48
"""Real requests of each version, of whose rounds swaps are drawn."""
MOST_WINDOWS = 5
"""A version drafts in the watching window and, after the trial, in at most four of confirming."""
_BLOCK = 16


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


def bad_ones(one: World, known: Known, each: int) -> dict[str, Any]:
    """All kinds."""
    found = {}
    for name, make in KINDS.items():
        results, not_made = [], list[str]()
        for seed in range(each):
            began_s = time.monotonic()
            try:
                candidate = make(one, known, seed)
            except NotMadeError as error:
                not_made.append(str(error))
                say(f"{name}: not made: {error}")
                continue
            made_s = time.monotonic() - began_s
            results.append(tried(one, candidate, known))
            seconds = time.monotonic() - began_s
            say(f"{name}: {results[-1]}, {seconds:.0f} s, {made_s:.0f} of them to make it")
        lives = [live for _, _, live in results]
        found[name] = {
            "candidates": len(results),
            "not_made": not_made,
            "gate": dict(Counter(gate or "not judged" for gate, _, _ in results)),
            "refused_by_publish": sum(refusal is not None for _, refusal, _ in results),
            "live": dict(Counter(live.outcome for live in lives)),
            "load_refusals": dict(Counter(live.reason for live in lives if live.reason)),
            "rounds": [live.rounds for live in lives],
        }
    return found


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


def good_ones(one: World, known: Known, live: int, draws: int) -> dict[str, Any]:
    """Equal ones and better ones, live and drawn."""
    swap = one.settings.swap
    watch = swap.watch_rounds, swap.max_drop
    lives: dict[str, list[Live]] = {"equal": []}
    for seed in range(live):
        lives["equal"].append(one.offer(noisy(one.tensors(), seed), HOME))
        one.back_to_first()
    say(f"equal: {Counter(x.outcome for x in lives['equal'])}")
    former = sequences(one.play_requests(AWAY, REQUESTS))
    drawn = {"equal": watched(former, former, *watch, draws, seed=1)}
    gates: dict[str, Any] = {}
    if known.better is not None:
        lives["better"] = []
        for seed in range(live):
            lives["better"].append(one.offer(noisy(one.tensors_of(known.better), seed), AWAY))
            if seed == live - 1:
                new = sequences(one.play_requests(AWAY, REQUESTS))
                drawn["better"] = watched(former, new, *watch, draws, seed=2)
            one.back_to_first()
        say(f"better: {Counter(x.outcome for x in lives['better'])}")
        held_out = known.judging["away"]
        gates = {
            f"better, {num} held-out traces": gated(one, known.better, held_out, num, draws, seed=3)
            for num in (one.settings.trainer.held_out_traces, 32)
        }
    return {
        "live": {name: dict(Counter(x.outcome for x in found)) for name, found in lives.items()},
        "watch": drawn,
        "gate": gates,
    }


def counts_of(traces: Sequence[Trace], num_tokens: int) -> Tensor:
    """[num_tokens] int64: how often each token occurs in the completions."""
    ids = [torch.from_numpy(t.token_ids[t.prompt_length :].astype("int64")) for t in traces]
    return torch.bincount(torch.cat(ids), minlength=num_tokens)


def known_of(one: World) -> Known:
    """What trainers of candidates know: traces of both domains, and a better drafter."""
    traces = {"home": one.play_requests(HOME, 2 * JUDGED)}
    traces["away"] = one.play_requests(AWAY, 3 * JUDGED)
    held = {name: one.hold(found) for name, found in traces.items()}
    num_tokens = int(one.manifest.drafter_config["target_vocab_size"])  # type: ignore[call-overload]
    known = Known(
        held["home"][JUDGED:],
        held["away"][JUDGED:],
        {name: samples[:JUDGED] for name, samples in held.items()},
        {name: one.judge(one.model()) for name in held},
        {name: counts_of(found, num_tokens) for name, found in traces.items()},
        None,
    )
    return replace(known, better=better_than_first(one, known.away, known))


def measure(each: int, live: int, draws: int, seed: int) -> dict[str, Any]:
    """All of it, in a folder of its own."""
    torch.set_num_threads(1)
    began_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="candidates-") as name,
        world((HOME, AWAY), seed, Path(name)) as one,
    ):
        known = known_of(one)
        say(f"a better one: {known.better is not None}, {time.monotonic() - began_s:.0f} s")
        bad = bad_ones(one, known, each)
        good = good_ones(one, known, live, draws)
        watch_rounds = one.settings.swap.watch_rounds
    return {
        "bad": bad,
        "good": good,
        "most_rounds": most_rounds(watch_rounds),
        "seconds": time.monotonic() - began_s,
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
    each: Annotated[int, typer.Option(min=1, help="candidates of each bad kind")] = 6,
    live: Annotated[int, typer.Option(min=1, help="good ones of each kind swapped in live")] = 4,
    draws: Annotated[int, typer.Option(min=1, help="good ones drawn from real requests")] = 5000,
    seed: int = 0,
    publish: Annotated[bool, typer.Option(help="write rows/candidates.json, too")] = False,
    out: Out = RESULTS / "candidates.json",
) -> None:
    """Offer bad and good candidates, and count what becomes of them."""
    found = measure(each, live, draws, seed)
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
