"""Processes of a server that note when a request passes their stations.

    python -P -m benchmarks.border.stamps server FOLDER LAUNCH_ARGUMENTS...
    python -P -m benchmarks.border.stamps http FOLDER DESCRIPTOR... NUM_ROWS ROW

The first is ``python -m serving``, and starts the second in place of its HTTP processes. All else
is the server's own. A stamp takes a microsecond, and each process writes its own file.
``time.perf_counter`` is one clock for all processes of a host.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import numpy as np

ROOM = 1 << 21
"""Stamps that a file holds; later ones are not noted."""
ALONE = "alone.json"
"""What the engine does before it serves; see ``answer_alone``."""


class Station(IntEnum):
    """Where a request may be, in the order in which it passes."""

    SENT = auto()
    BYTES = auto()
    ROUTED = auto()
    PARSED = auto()
    TOKENIZED = auto()
    SUBMITTED = auto()
    RECEIVED = auto()
    QUEUED = auto()
    SLEEPS = auto()
    WOKE = auto()
    ADMITTED = auto()
    PROMPT_LAUNCH = auto()
    PROMPT_LAUNCHED = auto()
    ROUND_LAUNCH = auto()
    ROUND_LAUNCHED = auto()
    PROMPT_READ = auto()
    HANDED_OVER = auto()
    OUTPUT = auto()
    FIRST_EVENT = auto()
    ROUND_READ = auto()
    FINISH = auto()
    FINISHED = auto()
    ANSWER = auto()
    WRITTEN = auto()
    ANSWERED = auto()
    MAKE = auto()
    MADE = auto()
    COLLECT = auto()
    COLLECTED = auto()


class Stamps:
    """Where one process notes them. For any thread."""

    def __init__(self, folder: Path, role: str) -> None:
        self._path = folder / f"{role}-{os.getpid()}.stamps"
        np.zeros((ROOM, 2)).tofile(self._path)
        self._noted = np.memmap(self._path, np.float64, "r+", shape=(ROOM, 2))
        self._places = itertools.count()

    def note(self, station: Station, at_s: float | None = None) -> None:
        place = next(self._places)
        if place < ROOM:
            self._noted[place] = time.perf_counter() if at_s is None else at_s, station

    def around(self, owner: Any, name: str, before: Station | None, after: Station | None) -> None:
        """Let a function of a class or module note its begin and its end.

        Args:
            before, after: ``None``: not noted.
        """
        usual, note = getattr(owner, name), self.note

        @functools.wraps(usual)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                note(before)
            found = usual(*args, **kwargs)
            if after is not None:
                note(after)
            return found

        setattr(owner, name, noted)

    def if_any(self, owner: Any, name: str, before: Station | None, after: Station) -> None:
        """The same for a function that has done nothing if what it returns is false."""
        usual, note = getattr(owner, name), self.note

        @functools.wraps(usual)
        def noted(*args: Any, **kwargs: Any) -> Any:
            begun_s = time.perf_counter()
            found = usual(*args, **kwargs)
            if found:
                if before is not None:
                    note(before, begun_s)
                note(after)
            return found

        setattr(owner, name, noted)

    def collections(self) -> None:
        """Note those of the garbage collector."""

        def noted(phase: str, _: dict[str, int]) -> None:
            self.note(Station.COLLECT if phase == "start" else Station.COLLECTED)

        gc.callbacks.append(noted)


def read(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What all processes have noted: role -> [N, 2] seconds and stations, in order of time."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("*.stamps")):
        noted = np.array(np.memmap(path, np.float64, "r", shape=(ROOM, 2)))
        role = path.name.partition("-")[0]
        found.setdefault(role, []).append(noted[noted[:, 1] > 0])
    joined = {role: np.concatenate(parts) for role, parts in found.items()}
    return {role: parts[parts[:, 0].argsort(kind="stable")] for role, parts in joined.items()}


# ---- what notes ---------------------------------------------------------------------------------


def note_http(stamps: Stamps) -> None:
    """Let HTTP of this process note its stations."""
    import serving.http.routes.chat as chat
    import serving.http.routes.completions as completions
    from serving.http.generation import Generation
    from serving.http.generation_route import GenerationRoute
    from serving.http.streaming import Mailbox
    from serving.http.uvicorn_server import GuardedProtocol

    stamps.around(GuardedProtocol, "data_received", Station.BYTES, None)
    stamps.around(GenerationRoute, "handle", Station.ROUTED, None)
    for route in (chat, completions):
        stamps.around(route, "check_body", Station.PARSED, None)
        stamps.around(route, "plan_job", Station.TOKENIZED, None)
        stamps.around(route, "json_answer", Station.ANSWER, None)
    stamps.around(Generation, "submit", Station.SUBMITTED, None)
    stamps.around(Mailbox, "put", Station.OUTPUT, None)
    stamps.around(GuardedProtocol, "on_response_complete", Station.WRITTEN, None)
    stamps.collections()


def note_engine(stamps: Stamps) -> None:
    """Let the engine of this process note its stations."""
    from serving.border.engine_side import Line
    from serving.border.in_process import InProcess
    from serving.border.outbox import Outbox
    from serving.engine.inbox import Inbox
    from serving.engine.making import Making
    from serving.engine.outputs import Outputs
    from serving.engine.prefill import Prefill
    from serving.engine.rounds import Rounds
    from serving.engine.scheduler import Scheduler

    stamps.around(Line, "_submit", Station.RECEIVED, None)
    stamps.around(Inbox, "submit_all", None, Station.QUEUED)
    stamps.around(Inbox, "wait", Station.SLEEPS, Station.WOKE)
    stamps.if_any(Scheduler, "admit", None, Station.ADMITTED)
    stamps.around(Prefill, "launch", Station.PROMPT_LAUNCH, Station.PROMPT_LAUNCHED)
    stamps.around(Prefill, "read", None, Station.PROMPT_READ)
    stamps.around(Rounds, "launch", Station.ROUND_LAUNCH, Station.ROUND_LAUNCHED)
    stamps.around(Rounds, "read", None, Station.ROUND_READ)
    stamps.around(Outputs, "finish", Station.FINISH, Station.FINISHED)
    stamps.around(Outbox, "put", Station.HANDED_OVER, None)
    stamps.around(InProcess, "_hand_over", Station.HANDED_OVER, None)
    stamps.if_any(Making, "make", Station.MAKE, Station.MADE)
    stamps.collections()


# ---- the processes ------------------------------------------------------------------------------


def be_http(folder: Path, numbers: Sequence[str]) -> None:
    """What ``python -m serving.border`` does, with stamps."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    note_http(Stamps(folder, "http"))
    import serving.border.__main__ as border

    sys.argv = ["serving.border", *numbers]
    border.main()


def be_server(folder: Path, arguments: Sequence[str]) -> None:
    """What ``python -m serving`` does, with stamps."""
    from serving.border import processes
    from serving.cli import app
    from serving.service import Service

    processes.COMMAND = ["-P", "-m", "benchmarks.border.stamps", "http", str(folder)]
    stamps = Stamps(folder, "engine")
    note_engine(stamps)
    note_http(stamps)
    start = Service.start

    def started(service: Service) -> None:
        if (asked := folder / ALONE).exists():
            answer_alone(service, folder, json.loads(asked.read_text()))
        start(service)

    Service.start = started  # type: ignore[method-assign]
    sys.argv = ["serving", *arguments]
    app(prog_name="serving")


def answer_alone(service: Any, folder: Path, bodies: Sequence[dict[str, Any]]) -> None:
    """Let the engine answer requests one after another before it serves, without HTTP, without
    other threads, and noted as a client's.

    Args:
        bodies: of requests.
    """
    import asyncio

    import torch

    from serving.http.prompts import PromptEncoder

    encoder, client = PromptEncoder(service.model.tokenizer), Stamps(folder, "alone")
    most = service.model.max_model_len
    requests = [asyncio.run(_request(encoder, n, body, most)) for n, body in enumerate(bodies)]
    encoder.close()
    gc.collect()
    gc.disable()  # a server hides what it is made of from the collector once it serves
    with torch.inference_mode():
        for request in requests:
            client.note(Station.SENT)
            ended: list[Any] = []
            _submit(service.engine.inbox, request, ended)
            while not ended:
                service.engine.step()
            client.note(Station.ANSWERED)
            while service.engine.step():  # what was launched before the end was known
                pass
    gc.enable()


def _submit(inbox: Any, request: Any, ended: list[Any]) -> None:
    def take(output: Any) -> None:
        if output.finish_reason is not None:
            ended.append(output)

    inbox.submit(request, take)


async def _request(encoder: Any, number: int, body: dict[str, Any], most: int) -> Any:
    from serving.requests import Request
    from serving.sampling import SamplingParams

    if "messages" in body:
        ids = await encoder.encode_chat(body["messages"], most)
    else:
        (ids,) = await encoder.encode([body["prompt"]], most)
    sampling = SamplingParams(
        temperature=body["temperature"],
        seed=body["seed"],
        max_tokens=body["max_tokens"],
        ignore_eos=body["ignore_eos"],
    )
    drafters = body["speculation"].get("drafters")
    return Request(
        f"alone-{number}",
        ids,
        sampling,
        max_draft=body["speculation"]["max_draft"],
        capture=body["capture"],
        drafters=None if drafters is None else frozenset(drafters),
    )


def main() -> None:
    """See the module."""
    kinds: dict[str, Callable[[Path, Sequence[str]], None]] = {
        "server": be_server,
        "http": be_http,
    }
    kinds[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])


if __name__ == "__main__":
    main()
