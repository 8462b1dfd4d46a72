"""The commands; see ``benchmarks.border``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import benchmarks.border
from benchmarks.border import contention, events, sorts, speed, starts, survival, timeline
from benchmarks.harness.results import RESULTS, Row, say, write_result, write_rows

app = typer.Typer(no_args_is_help=True, help=benchmarks.border.__doc__)
Publish = Annotated[bool, typer.Option("--publish", help="write the figures into the results")]


@app.command()
def survive(
    requests: int = 10_000,
    seed: int = 0,
    processes: Annotated[int, typer.Option(help="HTTP processes", min=1)] = 2,
    kill_every_s: Annotated[float, typer.Option(help="seconds between two kills")] = 5.0,
    publish: Publish = False,
) -> None:
    """Send requests of mixed kinds while HTTP processes are killed. Exit code 1: a claim fails."""
    figures = survival.measure(requests, seed, processes, kill_every_s)
    for ending, count in figures["endings"].items():
        say(f"{count:6} {ending}")
    rows = survival.rows_of(figures)
    _finish("survive", figures, rows, publish)
    if not all(row.holds for row in rows):
        raise typer.Exit(1)


@app.command("speed")
def measure_speed(
    set_: Annotated[list[str] | None, typer.Option("--set", help="settings of the server")] = None,
    clients: Annotated[
        list[int] | None, typer.Option(help="repeatable; default 8, 32, 128")
    ] = None,
    processes: Annotated[list[int] | None, typer.Option(help="repeatable; default 0, 1, 2")] = None,
    seconds: Annotated[float, typer.Option(help="of each turn")] = 10.0,
    turns: int = 5,
    max_draft: Annotated[
        int | None, typer.Option(help="0: plain decoding; the default lets the policy decide")
    ] = None,
    publish: Publish = False,
) -> None:
    """Compare arrangements of HTTP with the engine alone, in turn."""
    from configs.load import load_settings
    from targets.find import checked_folder

    wanted = load_settings((), set_ or (), {})
    numbers = clients or [8, 32, 128]
    own = [f"engine.max_batch={max(numbers)}", f"engine.max_queue={4 * max(numbers)}"]
    load = speed.Load(
        settings=(*own, *(set_ or ())),
        vocab_size=_vocab_size(checked_folder(wanted.target, wanted.target_cache)),
        seconds=seconds,
        max_draft=max_draft,
    )
    found = speed.measure(load, numbers, processes or [0, 1, 2], turns)
    drafts = "the policy decides" if max_draft is None else f"at most {max_draft} draft tokens"
    figures = {"settings": load.settings, "max_draft": max_draft, "turns": turns, "rows": found}
    name = "speed" if max_draft is None else f"speed_k{max_draft}"
    _finish(name, figures, speed.rows_of(found, f"{Path(wanted.target).name}, {drafts}"), publish)


@app.command("events")
def measure_events(
    clients: Annotated[int, typer.Option(min=1)] = 128,
    step_ms: Annotated[float, typer.Option(help="of the engine")] = 20.0,
    seconds: Annotated[float, typer.Option(help="of each turn")] = 5.0,
    turns: int = 3,
    publish: Publish = False,
) -> None:
    """Count what an event costs the engine's process and an HTTP process, without a target."""
    found = events.measure_turns(clients, step_ms, seconds, turns)
    figures = {"clients": clients, "step_ms": step_ms, "turns": [asdict(one) for one in found]}
    _finish("events", figures, list(events.rows_of(found, clients)), publish)


@app.command("starts")
def measure_starts(
    clients: Annotated[int, typer.Option(min=1)] = 32,
    step_ms: Annotated[float, typer.Option(help="of the engine")] = 3.2,
    seconds: Annotated[float, typer.Option(help="of each turn")] = 5.0,
    turns: int = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", help="settings of the server")] = None,
    publish: Publish = False,
) -> None:
    """Measure gaps of streams while requests begin and end, and what a request costs."""
    found = starts.measure_turns(clients, step_ms, seconds, turns, set_ or ())
    figures = {"clients": clients, "step_ms": step_ms, "turns": [asdict(one) for one in found]}
    _finish("starts", figures, list(starts.rows_of(found, clients, step_ms)), publish)


@app.command("timeline")
def measure_timeline(
    config: Annotated[list[str] | None, typer.Option(help="settings files or names")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="settings of the server")] = None,
    processes: Annotated[list[int] | None, typer.Option(help="repeatable; default 0, 2")] = None,
    requests: Annotated[int, typer.Option(help="of each turn", min=2)] = 60,
    turns: Annotated[int, typer.Option(help="of whole answers and of streams", min=1)] = 2,
    tokens: Annotated[int, typer.Option(help="of an answer", min=2)] = 64,
    words: Annotated[int, typer.Option(help="of a prompt", min=1)] = 80,
    temperature: float = 0.7,
    max_draft: Annotated[
        int, typer.Option(help="0: plain decoding; negative: the policy decides")
    ] = 0,
    drafters: Annotated[
        str | None, typer.Option(help="that may draft, as 'a,b', or ''; needs --config compare")
    ] = None,
    chat: Annotated[bool, typer.Option(help="conversations in place of completions")] = True,
    capture: Annotated[bool, typer.Option(help="answers are trained on")] = False,
    name: Annotated[str, typer.Option(help="of the target, for the rows")] = "bundled target",
    publish: Publish = False,
) -> None:
    """Show where the time of a request goes that is not decoding, for a single client."""
    kinds = None if drafters is None else tuple(filter(None, drafters.split(",")))
    limit = None if max_draft < 0 else max_draft
    kind = timeline.Kind(tokens, words, temperature, limit, kinds, chat, capture)
    asked = tuple(timeline.bodies(requests, kind))
    load = timeline.Load(tuple(config or ["demo"]), tuple(set_ or ()), asked, turns)
    found = timeline.measure_all(load, processes or [0, 2])
    print(timeline.table(found))
    figures = {"settings": load.settings, "kind": asdict(kind), "turns": turns, "found": found}
    _finish("timeline", figures, timeline.rows_of(found, name), publish)


@app.command("sorts")
def measure_sorts(
    config: Annotated[list[str] | None, typer.Option(help="settings files or names")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="settings of the server")] = None,
    name: Annotated[str, typer.Option(help="of the target, for the rows")] = "bundled target",
    publish: Publish = False,
) -> None:
    """Measure how long the first request of each sort waits on a new server."""
    figures = sorts.measure(config or ["demo"], set_ or ())
    _finish("sorts", figures, sorts.rows_of(figures, name), publish)


@app.command("contention")
def measure_contention(
    readers: Annotated[list[int] | None, typer.Option(help="repeatable; default 1, 2, 4")] = None,
    device_ms: Annotated[float, typer.Option(help="milliseconds of a program")] = 1.3,
    seconds: Annotated[float, typer.Option(help="of each turn")] = 3.0,
    rounds: int = 3,
    publish: Publish = False,
) -> None:
    """Count what the border costs the engine's loop, with a stand-in for the device."""
    found = contention.measure(readers or [1, 2, 4], device_ms, seconds, rounds)
    figures = {"device_ms": device_ms, "turns": [asdict(one) for one in found]}
    _finish("contention", figures, list(contention.rows_of(found, device_ms)), publish)


def _vocab_size(folder: Path) -> int:
    """Tokens that prompts are made of: those of the tokenizer, without special ones at its end."""
    from targets.tokenizer import load_tokenizer

    return int(load_tokenizer(folder).vocab_size)


def _finish(name: str, figures: dict[str, Any], rows: Iterable[Row], publish: bool) -> None:
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if publish:
        write_result(RESULTS / f"border_{name}.json", figures)
        write_rows("border", rows, f"python -m benchmarks.border {name}")


if __name__ == "__main__":
    app()
