"""A recorder in a process of its own.

Encoding traces and writing them takes half a core where small targets are decoded at full speed,
and in the engine's process each bit of it takes the interpreter's lock from the engine's thread.

SIGINT and SIGTERM are blocked in it, because they concern the server, whose process tells it when
to end. When that process is gone, it writes what it was sent, and ends.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator

from buffer.backends import open_backend
from configs.logs import set_up_logging
from configs.schema import Settings
from serving.capture.encoding import TraceEncoder
from serving.capture.finished import Finished
from serving.capture.messages import VERSION, Begin, End, Opened, Refused, ToRecorder, frame
from serving.capture.opening import open_recorder
from serving.capture.recorder import Recorder
from serving.capture.redaction import Redaction, redaction_of
from serving.capture.shared_counts import SharedCounts
from serving.engine.captured_rows import CapturedRows
from serving.framing import Frames, ProtocolError

log = logging.getLogger("serving.capture")

_LAST_S = 10.0
"""For what is queued when the server's process is gone."""
_PUBLISH_S = 0.02
_READ_BYTES = 1 << 20


def main(border: int) -> int:
    """Record for the process at the other end of a socket, until it says so or is gone.

    Args:
        border: descriptor of the socket.

    Returns:
        The exit code: 1 if the settings cannot be used, or something failed.
    """
    os.set_inheritable(border, False)
    sock = socket.socket(fileno=border)
    data, descriptors, _, _ = socket.recv_fds(sock, _READ_BYTES, 2)
    messages = _messages(sock, data)
    begin = next(messages, None)
    if begin is None:
        return 0  # nobody wanted it
    assert isinstance(begin, Begin) and len(descriptors) == 2
    settings = Settings.model_validate_json(begin.settings)
    set_up_logging(settings.log_level)
    try:
        if begin.version != VERSION:
            raise ValueError(
                f"the package was replaced while the server started: messages of version "
                f"{begin.version} arrive, this is version {VERSION}; start the server again"
            )
        backend = open_backend(settings.buffer.url, settings.run_dir)
        recorder = open_recorder(settings, backend, is_another=True)
        redaction = redaction_of(settings.capture)
    except ValueError as error:
        sock.sendall(frame(Refused(str(error))))
        return 1
    encoder = TraceEncoder(
        CapturedRows.mapped(descriptors[0], begin.shape, begin.dtype), begin.layer_ids
    )
    counts = SharedCounts(descriptors[1])
    for descriptor in descriptors:
        os.close(descriptor)

    def publish() -> None:
        counts.write({**recorder.counts(), "lost_rows": encoder.num_lost_rows})

    publish()  # what former processes left
    sock.sendall(frame(Opened()))
    recorder.start()
    stop = threading.Event()
    publisher = threading.Thread(target=_again_and_again, args=(publish, stop), daemon=True)
    publisher.start()
    timeout_s = _record(messages, recorder, encoder, redaction)
    recorder.close(timeout_s)
    stop.set()
    publisher.join()
    publish()
    return 0


def _messages(sock: socket.socket, data: bytes) -> Iterator[ToRecorder]:
    """What arrives, until the other side is gone."""
    frames = Frames[ToRecorder](ToRecorder)
    try:
        while data:
            yield from frames.feed(data)
            data = sock.recv(_READ_BYTES)
    except (OSError, ProtocolError) as error:
        log.error("the recorder's process gets no more traces: %s", error)


def _record(
    messages: Iterator[ToRecorder],
    recorder: Recorder,
    encoder: TraceEncoder,
    redaction: Redaction | None,
) -> float:
    """Queue what arrives. Returns the time that there is at the end, in seconds."""
    for message in messages:
        if isinstance(message, End):
            return message.timeout_s
        assert isinstance(message, Finished)
        encode = encoder.of(message)
        recorder.put(encode if redaction is None else redaction.of(encode))
    return _LAST_S


def _again_and_again(publish: object, stop: threading.Event) -> None:
    assert callable(publish)
    while not stop.wait(_PUBLISH_S):
        publish()
