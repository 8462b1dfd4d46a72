"""The host's own part of a step: what the engine's thread does outside the device's programs.

    python -m benchmarks.engine.host                          # four minutes on one core
    python -m benchmarks.engine.host --batches 32 --arms plain --turns 5

Batches of requests decode in the engine's own loop, as a server on a GPU does: a round is launched
before the last one is read. In place of the programs of rounds, prompts and drafters, ``StandIn``
draws their outcomes at once, and the host waits for each as long as a device would take. Neither
counts, and the caches stay as warm as beside a GPU. Callbacks of requests do nothing. Arms: plain
decoding; a lookup drafter that always drafts K tokens, half of which are kept, over a full index;
and the policy deciding among drafters of which no token is kept.

``host_us`` is the median of ``time.thread_time`` over the steps, so other work on the machine
counts only by the caches it spoils. The parts are medians of ``time.perf_counter`` over other
steps, since reading thread time takes a microsecond. They are exclusive: what one part calls of
another counts there. ``kept_objects`` are those that each request keeps of a step and that the
garbage collector still visits once it has seen them.

Writes ``benchmarks/results/host.json`` after every row, and with ``--publish`` rows of ``host``:
what plain decoding and the policy take, with and without capture. On the host of a card
they say what that host takes; the card has nothing to do with it.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer

from benchmarks.harness.arms import LOOKUP, OFF
from benchmarks.harness.engines import Built, build, settings_for
from benchmarks.harness.loops import clear
from benchmarks.harness.random_targets import publish_drafters, random_target
from benchmarks.harness.results import RESULTS, Out, Row, at_most, known, write_each, write_rows
from policies.fixed import FixedPolicy
from serving.engine.cuda_graphs import Landing
from serving.engine.graph_recorder import Program
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams
from specops.lanes import Column, Field, Input

_SHAPE, _TOKENIZER = "tiny", "examples/target"
_NUM_PROMPT, _MAX_TOKENS, _WARM_UPS = 48, 464, 12
_MAX_DRAFT = 4
_RECENT_TOKENS, _RECENT_LENGTH = 80_000, 500
"""Finished traffic in the index, and tokens of each request of it."""
_NUM_WORDS = 40
"""Tokens that text is made of: few enough that a lookup mostly finds a match."""
ARMS = {"plain": (OFF, 0.0), "lookup": ((LOOKUP, _MAX_DRAFT), 0.5), "goodput": (None, 0.0)}
"""(Drafter, K), or ``None`` for the settings' own policy, and the share of drafts that are kept."""
MOST_MS = {32: 0.35, 64: 0.6, 128: 1.0}
"""Wanted at most, by requests."""
MOST_OBJECTS = 0.1
"""Wanted at most, objects that a request keeps of a step. What is kept of a round are numbers; an
object for each round would be 1."""
_DEVICE = "device"
"""The part of a step that is not the host's."""
PARTS = {
    "inbox": ("_take_orders", "_admit"),
    "schedule": ("scheduler.plan", "_undecided"),
    "plan": ("deciding.decide",),
    "observe": ("drafting.observe",),
    "policy": ("policy.rest", "policy.wants_matches", "policy.plan"),
    "propose": ("drafting.from_host",),
    "foresee": ("_foresee",),
    "launch": ("programs.rounds.launch",),
    "decode": ("programs.rounds.read",),
    "note": ("_commits._note",),
    "commit": ("_commits.rounds",),
    "emit": ("_outputs.after_commit",),
    "report": ("_report",),
    "learn": ("policy.observe",),
}
"""Part of a step -> methods of the engine, by path."""


class StandIn:
    """Draws what the device would have computed. Text is made of a few tokens."""

    def __init__(self, engine: Engine, acceptance: float, device_s: float) -> None:
        """
        Args:
            acceptance: probability that a draft token is kept, given the one before it was.
            device_s: seconds that a program takes, beside the host.
        """
        programs = engine.programs
        self._rounds, self._prefill = programs.rounds, programs.prefill
        self._lanes, self._acceptance = programs.lanes, acceptance
        self._device_s, self._done_s = device_s, 0.0
        self._landings_s: dict[int, float] = {}
        """When what was launched is done, by the identity of its landing."""
        self._numbers = np.random.default_rng(0)

    def round_program(self, key: Any) -> Program:
        """In place of ``Rounds._program``."""
        return lambda: self._round(key)

    def prompt_program(self, size: int) -> Program:
        """In place of ``Prefill._program``."""
        return lambda: self._prompts(size)

    def other_program(self, _size: int) -> Program:
        """In place of a program whose outcome the host does not read."""
        return self._take_time

    def launching(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """``launch`` of rounds or prompts, noting when the device is done with what it launched."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            launched = launch(*args, **kwargs)
            self._landings_s[id(launched.landed)] = self._done_s
            return launched

        return noted

    def wait(self, landing: Landing) -> bool:
        """In place of ``Landing.wait``."""
        done_s = self._landings_s[id(landing)]
        had_to = time.perf_counter() < done_s
        while time.perf_counter() < done_s:
            pass
        return had_to

    @property
    def left_s(self) -> float:
        """Seconds until all programs are done; not positive if they are."""
        return self._done_s - time.perf_counter()

    def words(self, *shape: int) -> np.ndarray:
        """Token ids of random text."""
        return self._numbers.integers(_NUM_WORDS, size=shape)

    def _take_time(self) -> None:
        self._done_s = max(self._done_s, time.perf_counter()) + self._device_s

    def _round(self, key: Any) -> None:
        size, num_draft = key.size, key.num_draft
        inputs = self._rounds._io.inputs[:size].numpy()
        outputs = self._rounds._io.outputs[:size].numpy()
        if key.neural:
            lens, drafts = np.full(size, num_draft), self.words(size, num_draft)
        else:
            lens = np.minimum(inputs[:, Input.DRAFTED], num_draft)
            drafts = inputs[:, Input.TOKENS : Input.TOKENS + num_draft]
        keeps = self._numbers.random((size, num_draft)) < self._acceptance
        kept = np.minimum(np.cumprod(keeps, axis=1).sum(axis=1), lens)
        captures = self._lanes.ints.numpy()[Field.CAPTURES, inputs[:, Input.LANE]]
        outputs[:, Column.ACCEPTED] = kept
        outputs[:, Column.NEXT] = self.words(size)
        outputs[:, Column.DRAFTED] = lens
        outputs[:, Column.CAPTURED] = (kept + 1) * captures
        outputs[:, Column.TOKENS : Column.TOKENS + num_draft] = drafts
        self._take_time()

    def _prompts(self, size: int) -> None:
        outputs = self._prefill._outputs[:size].numpy()
        outputs[:, Column.NEXT] = self.words(len(outputs))
        self._take_time()


class Meter:
    """Splits the time of steps by part: each moment belongs to the innermost part that runs."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        self.spent_ns: Counter[str] = Counter()
        self._stack = ["rest"]
        self._last_ns = clock_ns()

    def wrap(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, counted as ``part``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self._stack.append(part)
            try:
                return work(*args, **kwargs)
            finally:
                self._lap()
                self._stack.pop()

        return counted

    def begin(self) -> None:
        """Start over."""
        self.spent_ns.clear()
        self._last_ns = self._clock_ns()

    def end(self) -> dict[str, float]:
        """Microseconds of each part since ``begin``."""
        self._lap()
        return {part: ns / 1e3 for part, ns in self.spent_ns.items()}

    def _lap(self) -> None:
        now_ns = self._clock_ns()
        self.spent_ns[self._stack[-1]] += now_ns - self._last_ns
        self._last_ns = now_ns


@contextmanager
def patched(changes: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    """Replace attributes of objects or classes: (owner, name) -> value."""
    former = {at: vars(at[0]).get(at[1]) for at in changes}
    for (owner, name), value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in former.items():
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def metered(
    engine: Engine, stand_in: StandIn, meter: Meter, parts: Mapping[str, Sequence[str]]
) -> Any:
    """Let the stand-in work, and count it and some parts of the engine's steps."""
    programs = engine.programs

    def counted(program_of: Callable[[Any], Program]) -> Callable[[Any], Program]:
        return lambda key: meter.wrap(_DEVICE, program_of(key))

    changes: dict[tuple[Any, str], Any] = {
        (programs.rounds, "_program"): counted(stand_in.round_program),
        (programs.prefill, "_program"): counted(stand_in.prompt_program),
        (programs.rounds, "launch"): stand_in.launching(programs.rounds.launch),
        (programs.prefill, "launch"): stand_in.launching(programs.prefill.launch),
        # As a method, it is given the landing.
        (Landing, "wait"): meter.wrap(_DEVICE, stand_in.wait),
    }
    for rows in engine.drafting.neural.values():
        changes[rows, "_program"] = counted(stand_in.other_program)
    for part, paths in parts.items():
        for path in paths:
            *owners, name = path.split(".")
            owner = attrgetter(".".join(owners))(engine) if owners else engine
            work = changes.get((owner, name), getattr(owner, name))
            changes[owner, name] = meter.wrap(part, work)
    return patched(changes)


@dataclass(frozen=True, slots=True)
class Case:
    """The arm and the requests of a batch."""

    arm: str
    batch: int
    temperature: float
    captures: bool

    def begin(self, engine: Engine, stand_in: StandIn) -> None:
        """Submit its requests, and step until each of them decodes."""
        heat, keeps = self.temperature, self.captures
        sampling = SamplingParams(temperature=heat, max_tokens=_MAX_TOKENS, ignore_eos=True)
        for number, row in enumerate(stand_in.words(self.batch, _NUM_PROMPT).tolist()):
            request = Request(f"host-{number}", tuple(row), sampling, capture=keeps)
            engine.inbox.submit(request, _ignore)
        for _ in range(_WARM_UPS):
            engine.step()


def _ignore(_output: Output) -> None:
    pass


def measure(
    built: Built, case: Case, num_steps: int, turns: int, device_s: float
) -> dict[str, Any]:
    """Medians over the steps of some turns, in which totals and parts alternate."""
    engine = built.engine
    arm, acceptance = ARMS[case.arm]
    engine.policy = FixedPolicy(*arm) if arm else built.policy.own
    stand_in = StandIn(engine, acceptance, device_s)
    totals: list[float] = []
    parts: dict[str, list[float]] = {}
    figures = Counter[str]()
    for _ in range(turns):
        meter = Meter(time.thread_time_ns)
        with metered(engine, stand_in, meter, {}):
            case.begin(engine, stand_in)
            before = _counts(engine)
            for _ in range(num_steps):
                spent = _step(engine, meter)
                totals.append(sum(spent.values()) - spent[_DEVICE])
            figures.update(_counts(engine))
            figures.subtract(before)
        meter = Meter(time.perf_counter_ns)
        with metered(engine, stand_in, meter, PARTS):
            for _ in range(num_steps):
                spent = _step(engine, meter)
                for part in (*PARTS, "rest"):
                    parts.setdefault(part, []).append(spent.get(part, 0.0))
            clear(engine)
    host_us, all_steps = statistics.median(totals), num_steps * turns
    return {
        **asdict(case),
        "host_us": host_us,
        "host_us_per_request": host_us / case.batch,
        "mean_us": statistics.mean(totals),
        "parts_us": {part: round(statistics.median(us), 1) for part, us in parts.items()},
        "tokens_per_step": figures["tokens"] / all_steps / case.batch,
        "collections_per_1000_steps": 1000 * (figures["collections"] - turns) / all_steps,
        "kept_objects": figures["objects"] / all_steps / case.batch,
    }


def _step(engine: Engine, meter: Meter) -> dict[str, float]:
    meter.begin()
    engine.step()
    return meter.end()


def _counts(engine: Engine) -> Counter[str]:
    """Tokens so far, collections so far, and objects that the collector visits, after one more
    collection."""
    collections = sum(one["collections"] for one in gc.get_stats())
    gc.collect()
    tokens = engine.figures().generation_tokens
    return Counter(tokens=tokens, collections=collections, objects=len(gc.get_objects()))


def rows_of(figures: Mapping[str, Any]) -> Iterator[Row]:
    """The claims of a case: those of lookups are about an index on the host."""
    if figures["arm"] == "lookup":
        return
    arm = {"plain": "plain decoding", "goodput": "policy with drafters of no use"}[figures["arm"]]
    kept = ", hidden rows kept" if figures["captures"] else ""
    batch = figures["batch"]
    case = f"{batch} requests, {arm}, temperature {figures['temperature']:g}{kept}"
    measure = "host's part of a step, ms, thread time, median"
    yield at_most(case, measure, figures["host_us"] / 1e3, MOST_MS.get(batch))
    kept_objects = round(figures["kept_objects"], 3)
    yield at_most(case, "objects kept of a step by each request", kept_objects, MOST_OBJECTS)


@contextmanager
def host_engine(max_batch: int, others: Sequence[str] = ()) -> Iterator[Built]:
    """An engine with all drafters and a full index; rounds overlap as on a GPU.

    Args:
        others: ``key=value`` settings beside its own.
    """
    device = torch.device("cpu")
    chosen = (
        f"engine.max_batch={max_batch}",
        f"engine.max_model_len={_NUM_PROMPT + _MAX_TOKENS}",
        f"drafter.max_draft={_MAX_DRAFT}",
        "drafter.suffix.enabled=true",
        f"drafter.suffix.recent_tokens={_RECENT_TOKENS}",
        "policy.kind=goodput",
        "capture.enabled=true",
        *others,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(_TOKENIZER)
        target = replace(random_target(_SHAPE, device), tokenizer=tokenizer)
        publish_drafters(Path(folder) / "weights", target)
        settings = settings_for(device, Path(folder), chosen, has_drafter=True)
        built = Built(*build(settings, target), device)
        engine = built.engine
        engine.parts = replace(engine.parts, overlaps=True)
        engine.programs.prefill._program(1)  # makes a buffer that the stand-in does not need
        _fill_index(engine)
        gc.collect()
        gc.freeze()  # as a server does
        try:
            yield built
        finally:
            gc.unfreeze()
            engine.stop()


def _fill_index(engine: Engine) -> None:
    """Let requests finish that later ones may draft from."""
    numbers, index = np.random.default_rng(1), engine.drafting.hosts.get(LOOKUP)
    namespace = Request("", (0,), SamplingParams()).namespace
    if index is None:
        return  # it is on the device, and takes the same time however full it is
    for number in range(_RECENT_TOKENS // _RECENT_LENGTH):
        key = f"finished-{number}"
        index.begin(key, numbers.integers(_NUM_WORDS, size=_RECENT_LENGTH).tolist(), namespace)
        index.finish(key, keep=True)
        index.begin("asks", [0], namespace)
        index.observe(["asks"])  # indexes what has finished
        index.finish("asks", keep=False)


def main(
    out: Out = RESULTS / "host.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,32,64,128",
    arms: Annotated[str, typer.Option(help="comma-separated")] = ",".join(ARMS),
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "0,0.7",
    num_steps: Annotated[int, typer.Option(help="steps of a turn, for totals and for parts")] = 40,
    turns: int = 2,
    device_ms: Annotated[float, typer.Option(help="milliseconds of a program")] = 1.0,
    publish: Annotated[bool, typer.Option("--publish", help="write rows, too")] = False,
) -> None:
    """Measure all cases."""
    torch.set_num_threads(1)
    sizes = [int(size) for size in batches.split(",")]
    chosen = known("arms", arms.split(","), ARMS)
    heats = [float(heat) for heat in temperatures.split(",")]
    cases = itertools.product(chosen, sizes, heats, (True, False))
    with torch.inference_mode(), host_engine(max(sizes)) as built:
        found: list[dict[str, Any]] = []

        def measured() -> Iterator[dict[str, Any]]:
            for case in cases:
                found.append(measure(built, Case(*case), num_steps, turns, device_ms / 1e3))
                yield found[-1]

        write_each(out, measured())
    if publish:
        rows = [row for figures in found for row in rows_of(figures)]
        write_rows("host", rows, "python -m benchmarks.engine.host")


if __name__ == "__main__":
    typer.run(main)
