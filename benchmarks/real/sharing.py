"""What a trainer on the same GPU costs the server, by its duty and its share of the GPU.

    python -m benchmarks.real.sharing --run-dir runs/real/sharing                            # 4 min
    python -m benchmarks.real.sharing --run-dir runs/real/sharing --duties 1,auto --pairs 4  # 2 min

Starts the demo's server and, for one ``trainer.duty``, ``trainer.max_serving_loss`` (with ``auto``)
or (under MPS) ``trainer.gpu_share`` after another, a trainer on the same card: the curve of what
serving keeps of its speed over the rows trained a second.
Clients send chat requests without pause, which are decoded without drafts, so that what is learned
changes no speed. The trainer is suspended and resumed in turn (SIGSTOP, SIGCONT); tokens are those
of the server's own counter. A figure is the median, over pairs of adjacent windows, of the tokens
per second with the trainer relative to those without. Rows a second are those of the time in which
it was not suspended. Beside them, four streams measure the gaps between the tokens of an answer.
With ``--mps`` both run under CUDA MPS; with ``--own-gpu`` the trainer has a second GPU.

Writes ``sharing.json`` and rows of ``rows/learning.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import typer

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
from benchmarks.harness.streams import Streams
from configs.load import load_settings
from examples import shared_gpu
from examples.clients import Server, Traffic
from examples.demo import (
    begin_server,
    begin_trainer,
    gather_texts,
    wait_for_server,
)
from examples.plan import TWO_GPU, DemoSettings, real_settings
from examples.processes import Child, check_alive, stop
from examples.run_folder import own_folder
from examples.traffic.prompts import Prompt

SOURCE = "python -m benchmarks.real.sharing"
GOAL = 0.95
SHARED, OWN = "shared card", "own card"
NUM_STREAMS = 4
SETTLE_S = 0.4
"""After a signal: updates that were launched before it end."""
AUTO_S = 6.0
"""Time in which ``duty: auto`` measures what the trainer costs, before it is measured itself."""
TOKENS = "generation_tokens_total"


class Way(NamedTuple):
    """How a trainer shares the card."""

    duty: float | Literal["auto"]
    loss: float
    """``trainer.max_serving_loss``, without meaning at a fixed duty."""
    gpu_share: float

    @property
    def overrides(self) -> tuple[str, ...]:
        """Settings of the trainer."""
        return (
            f"trainer.duty={self.duty}",
            f"trainer.max_serving_loss={self.loss}",
            f"trainer.gpu_share={self.gpu_share}",
        )

    def __str__(self) -> str:
        text = f"duty {self.duty}" if self.duty == "auto" else f"duty {self.duty:g}"
        if self.duty == "auto":
            text += f", serving may lose {self.loss:.0%}"
        if self.gpu_share < 1:
            text += f", {self.gpu_share:.0%} of the multiprocessors"
        return text


def ways_of(duties: str, losses: str, gpu_shares: str) -> list[Way]:
    """All combinations; a fixed duty has one loss, that of the default.

    Args:
        duties: comma-separated numbers, or ``auto``.
    """
    usual = load_settings([], [], {}).trainer.max_serving_loss
    found = []
    for duty in duties.split(","):
        allowed = [float(loss) for loss in losses.split(",")] if duty == "auto" else [usual]
        each = duty if duty == "auto" else float(duty)
        found += [Way(each, a, float(s)) for a in allowed for s in gpu_shares.split(",")]  # type: ignore[arg-type]
    return found


def num_tokens(server: Server) -> float:
    """Completion tokens that the server has made so far."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10.0) as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if not line.startswith("#") and line.split("{")[0].split(" ")[0].endswith(TOKENS)
    )


def status_of(run_dir: Path) -> dict[str, Any]:
    """The trainer's status; empty before the first one."""
    try:
        found: dict[str, Any] = json.loads((run_dir / "trainer" / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def trained(run_dir: Path) -> tuple[int, int]:
    """Updates and rows that the trainer has made, by its status."""
    status = status_of(run_dir)
    return int(status.get("step", 0)), int(status.get("trained_rows", 0))


def window(server: Server, seconds: float) -> float:
    """Tokens per second for some seconds."""
    before, began = num_tokens(server), time.perf_counter()
    time.sleep(seconds)
    return (num_tokens(server) - before) / (time.perf_counter() - began)


def compare(
    server: Server, streams: Streams, run_dir: Path, trainer: Child, pairs: int, seconds: float
) -> dict[str, Any]:
    """Windows with and without the trainer, in turn."""
    with_trainer: list[float] = []
    without: list[float] = []
    resumed_s = 0.0
    gaps: dict[bool, list[list[float]]] = {True: [], False: []}
    _, rows = trained(run_dir)
    try:
        for number in range(pairs):
            # The first of a pair is the other one each time, so that drift affects both alike.
            for runs in (True, False) if number % 2 else (False, True):
                trainer.process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
                resumed_at_s = time.monotonic()
                time.sleep(SETTLE_S)
                began_s = time.time()
                speed = window(server, seconds)
                gaps[runs].append(streams.gaps(began_s, time.time()))
                (with_trainer if runs else without).append(speed)
                resumed_s += time.monotonic() - resumed_at_s if runs else 0.0
        _, last_rows = trained(run_dir)
    finally:
        trainer.process.send_signal(signal.SIGCONT)
    ratios = [a / b for a, b in zip(with_trainer, without, strict=True)]
    return {
        "with_trainer_tokens_per_s": with_trainer,
        "without_tokens_per_s": without,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "rows_per_s": (last_rows - rows) / resumed_s,
        "trainers_own_figures": status_of(run_dir).get("sharing"),
        "num_gaps": sum(len(one) for ways in gaps.values() for one in ways),
        **{
            f"gap_p{q}_ms": {
                name: median_percentile_ms(gaps[runs], q)
                for name, runs in (("with_trainer", True), ("without", False))
            }
            for q in (50, 99)
        },
    }


def median_percentile_ms(windows: Sequence[Sequence[float]], q: int) -> float | None:
    """Of the windows in which a stream had gaps."""
    found = [float(np.percentile(window, q)) for window in windows if window]
    return 1000 * statistics.median(found) if found else None


def wait_until_learning(
    run_dir: Path, children: list[Child], since: int, num_updates: int, patience_s: float
) -> None:
    """Wait until the trainer has made so many updates more than ``since``.

    Raises:
        TimeoutError: it did not in time.
    """
    deadline = time.monotonic() + patience_s
    while trained(run_dir)[0] < since + num_updates:
        check_alive(children)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the trainer made {trained(run_dir)[0] - since} updates in {patience_s:g} s"
            )
        time.sleep(0.2)


def asked(
    model: str, prompts: Sequence[Prompt], settings: DemoSettings
) -> list[tuple[str, dict[str, Any]]]:
    """The same requests, to be streamed."""
    found = []
    for prompt in prompts[:256]:
        path, text = "/v1/completions", dict[str, Any](prompt=prompt.prompt)
        if prompt.messages is not None:
            path = "/v1/chat/completions"
            text = {"messages": [message.model_dump() for message in prompt.messages]}
        body = {
            "model": model,
            "max_tokens": settings.sampling.max_tokens,
            "temperature": settings.sampling.temperature,
            "seed": prompt.seed(settings.sampling.seed),
        }
        found.append((path, body | text))
    return found


def rows_of(found: Sequence[dict[str, Any]], clients: int, way_shared: str) -> list[Row]:
    """The claims, with the goal for the default duty and share."""
    default = load_settings([], [], {}).trainer
    usual = Way(default.duty, default.max_serving_loss, default.gpu_share)
    rows = []
    for one in found:
        way = Way(one["duty"], one["max_serving_loss"], one["gpu_share"])
        row = f"{way_shared}, {clients} clients, {way}"
        rows += [
            at_least(
                row,
                "serving with a trainer over serving without, tokens/s",
                one["ratio"],
                GOAL if way == usual else None,
            ),
            at_least(
                row,
                "rows trained per second meanwhile",
                one["rows_per_s"],
                1e5 if way_shared == OWN else None,
            ),
        ]
        for q in (50, 99):
            gap = one[f"gap_p{q}_ms"]
            measure = f"p{q} of the gap between two tokens, with a trainer over without"
            ratio = gap["with_trainer"] and gap["without"] and gap["with_trainer"] / gap["without"]
            rows.append(at_most(row, measure, ratio, 1.01 if way_shared == OWN else None))
    return rows


def carry_out(
    settings: DemoSettings,
    children: list[Child],
    ways: Sequence[Way],
    pairs: int,
    seconds: float,
    out: Path,
    *,
    way_shared: str,
    option: str,
) -> None:
    """Start the server, keep it busy, and measure each way; writes what is known after each."""
    children.append(begin_server(settings))
    texts = gather_texts(settings)
    server = wait_for_server(settings, children)
    prompts: list[Prompt] = [p for live in texts.live.values() for p in live]
    traffic = Traffic(
        server, prompts * 20, settings.num_clients, settings.sampling, lambda prompt, reply: None
    )
    streams = Streams(server.url, asked(server.model, prompts, settings), NUM_STREAMS)
    traffic.start()
    streams.start()
    found: list[dict[str, Any]] = []
    try:
        for way in ways:
            since, _ = trained(settings.run_dir)
            own = (*settings.overrides, *way.overrides)
            children.append(begin_trainer(replace(settings, overrides=own)))
            is_auto = way.duty == "auto"
            num_updates = 5 if is_auto else 20
            wait_until_learning(settings.run_dir, children, since, num_updates, patience_s=150.0)
            if is_auto:
                time.sleep(AUTO_S)
            figures = compare(server, streams, settings.run_dir, children[-1], pairs, seconds)
            stop([children.pop()])
            chosen = {"duty": way.duty, "max_serving_loss": way.loss, "gpu_share": way.gpu_share}
            found.append({**chosen, "clients": settings.num_clients, **figures})
            say(f"{way}: {figures['ratio']:.3f}, {figures['rows_per_s']:,.0f} rows/s")
            failures = traffic.failures[:3] + streams.failures[:3]
            write_result(out, {"way": way_shared, "rows": found, "failures": failures})
            rows = rows_of(found, settings.num_clients, way_shared)
            write_rows("learning", rows, f"{SOURCE}{option}", out.parent)
    finally:
        streams.stop()
        traffic.stop()


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the run, the benchmark's own")],
    out: Out = RESULTS / "sharing.json",
    target: Literal["bundled", "real"] = "real",
    duties: Annotated[str, typer.Option(help="values of trainer.duty")] = "1,0.5,0.25,auto",
    losses: Annotated[str, typer.Option(help="trainer.max_serving_loss, for auto")] = "0.05",
    gpu_shares: Annotated[str, typer.Option(help="trainer.gpu_share, for each of them")] = "1",
    pairs: int = 7,
    window_s: Annotated[float, typer.Option(help="seconds of a window")] = 2.5,
    mps: Annotated[bool, typer.Option("--mps", help="both run under CUDA MPS")] = False,
    own_gpu: Annotated[bool, typer.Option("--own-gpu", help="trainer on a second GPU")] = False,
) -> None:
    """Compare serving with and without a trainer, at each duty, loss and share of the GPU."""
    ways = ways_of(duties, losses, gpu_shares)
    settings = real_settings() if target == "real" else DemoSettings()
    way_shared = OWN if own_gpu else SHARED + ", CUDA MPS" * mps
    option = " --own-gpu" * own_gpu + " --mps" * mps
    settings = replace(
        settings,
        configs=(*settings.configs, TWO_GPU) if own_gpu else settings.configs,
        run_dir=run_dir,
        overrides=(
            *settings.overrides,
            "policy.kind=fixed",
            "policy.draft_k=0",
            "swap.enabled=false",
            "trainer.replay_ratio=1000000",
        ),
    )
    children: list[Child] = []
    with own_folder(run_dir), shared_gpu.mps() if mps else contextlib.nullcontext():
        try:
            carry_out(
                settings,
                children,
                ways,
                pairs,
                window_s,
                out,
                way_shared=way_shared,
                option=option,
            )
        finally:
            stop(children)


if __name__ == "__main__":
    typer.run(main)
