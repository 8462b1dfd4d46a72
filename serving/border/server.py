"""The server from its first request to its exit, with HTTP in this process or beside it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.schema import Settings
from serving.border.engine_side import welcome_for
from serving.border.in_process import Desk, InProcess
from serving.border.processes import HttpProcesses, Spawner
from serving.history import History, recorded
from serving.http.drain import Drain, announced
from serving.http.loading import answering_503
from serving.python_process import STOP_SIGNALS
from serving.service import Service

log = logging.getLogger(__name__)

_TICK_S = 0.05
_SWITCH_S = 1e-3
"""More than the engine's thread takes between two waits, so it is not interrupted itself."""
_CORES_EACH = 4
_STREAMS_OF_ONE = 32
"""So many streams of a target of 135M parameters on an H200 bring 20,000 events and 200 requests a
second, which takes half of a process. A busier one shows in the gaps between events."""
_STREAMS_EACH = 64
"""If there are several processes. More streams bring hardly more events, because the steps become
longer, and each process costs the engine's thread time: with 128 streams, two had 0.97 of the
engine's speed on an H200 and four 0.93."""
_MOST_PROCESSES = 4


def num_processes(settings: Settings, on_gpu: bool, cores: int | None = None) -> int:
    """HTTP processes beside the engine's: ``server.processes``, or what suits the device, the
    batch and the cores.

    Args:
        cores: of this machine; ``None``: as the system says.
    """
    if settings.server.processes is not None:
        return settings.server.processes
    if not on_gpu:
        return 0
    max_batch = settings.engine.max_batch
    wanted = 1 if max_batch <= _STREAMS_OF_ONE else max(2, -(-max_batch // _STREAMS_EACH))
    allowed = ((os.cpu_count() or 1) if cores is None else cores) // _CORES_EACH
    return max(1, min(wanted, allowed, _MOST_PROCESSES))


def serve_http(
    service: Service,
    settings: Settings,
    listener: socket.socket,
    tokenizer: Path,
    spawner: Spawner,
) -> int:
    """Answer requests until told to stop.

    Args:
        service: started.
        tokenizer: folder with the target's tokenizer.
        spawner: of the HTTP processes, if any; with a count of 0 HTTP is in this process.

    Returns:
        Exit code, see ``Drain.exit_code``; 1 also if HTTP processes die at once, again and again.
    """
    with recorded(service.figures) as history, _short_turns():
        if spawner.count == 0:
            from serving.http.app import create_app  # FastAPI: other processes have it otherwise
            from serving.http.uvicorn_server import serve

            app = create_app(InProcess(service, history), settings)
            return serve(app, service.inbox, settings, listener, lambda: service.engine.has_failed)
        return _serve_beside(service, settings, listener, tokenizer, spawner, history)


def _serve_beside(
    service: Service,
    settings: Settings,
    listener: socket.socket,
    tokenizer: Path,
    spawner: Spawner,
    history: History,
) -> int:
    drain = Drain(service.inbox, settings.server.drain_s, lambda: service.engine.has_failed)
    # Processes accept connections before the last client is answered with 503.
    desk = Desk(service, history, is_open=False)
    processes = HttpProcesses(spawner, desk, welcome_for(desk, settings, tokenizer))
    with _signals_to(drain), announced(listener, settings, service.model.model_name) as announce:
        left_s: float | None = None
        try:
            with answering_503(listener):
                left_s = _until(drain, processes, lambda: processes.is_ready)
            if left_s is None:
                desk.open()
                announce()
                left_s = _until(drain, processes, lambda: False)
        finally:
            listener.close()  # theirs are closed once they are told so
            processes.close(left_s or 0.0, lambda: drain.is_forced)
    return drain.exit_code


def _until(drain: Drain, processes: HttpProcesses, is_done: Callable[[], bool]) -> float | None:
    """Look after the processes. Returns ``None`` once ``is_done``, or what ``Drain.tick`` returns
    when the server is to end."""
    while not is_done():
        problem = processes.tick()
        if problem is not None:
            log.critical("%s; the server ends", problem)
            drain.fail()
        left_s = drain.tick()
        if left_s is not None:
            return left_s
        time.sleep(_TICK_S)
    return None


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads give up the GIL sooner, until the block ends: the engine's thread wants it again
    after each wait for the device, and by default others need not give it up within 5 ms."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


@contextmanager
def _signals_to(drain: Drain) -> Iterator[None]:
    """Let ``drain`` have the signals that end a server, until the block ends."""
    before = {number: signal.signal(number, drain.on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
