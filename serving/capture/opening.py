"""Opens the recorder that settings ask for, in whichever process it is to run."""

from __future__ import annotations

import logging
import os
import threading
from functools import partial

from buffer.backends import open_trace_writer
from buffer.forgetting_writer import ForgettingWriter
from buffer.interface import Backend, TraceWriter
from buffer.late_writer import LateWriter
from configs.schema import Settings
from serving.capture.recorder import Recorder

log = logging.getLogger(__name__)

_WAITING_SHARE = 1 / 16
"""Of the host's memory, at most, for traces that wait for the disk. A disk that is a tenth too slow
for the traffic takes minutes to fill it."""
_LOOK_S = 1.0
"""For the first look for deletions, which a service may keep waiting."""


def open_recorder(settings: Settings, backend: Backend, *, is_another: bool = False) -> Recorder:
    """
    Args:
        is_another: it may be given what finished long ago, so it looks for deletions first.

    Raises:
        ValueError: the settings contradict what is stored, such as another key.
    """
    writer = ForgettingWriter(_trace_writer(settings, backend), backend.deletions)
    if is_another:
        looking = threading.Thread(target=writer.look, name="first-look", daemon=True)
        looking.start()
        looking.join(_LOOK_S)
    waiting = int(_WAITING_SHARE * memory_bytes())
    sync_s = settings.buffer.sync_interval_s
    return Recorder(writer, settings.capture.queue_traces, sync_s, waiting)


def memory_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _trace_writer(settings: Settings, backend: Backend) -> TraceWriter:
    """Where traces go. Storage that cannot be opened is tried again with each of them: serving
    needs none.

    Raises:
        ValueError: the settings contradict what is stored, such as another key.
    """
    open_writer = partial(open_trace_writer, backend, settings.buffer, settings.run_dir)
    try:
        return open_writer()
    except OSError as error:
        log.warning(
            "traces cannot be written (%s); serving starts nevertheless. They are lost and counted "
            '(traces_total{result="failed"}) until this is mended',
            error,
        )
        return LateWriter(open_writer)
