"""Messages between the engine's process and the recorder's, as MessagePack.

The engine's process starts the other one, from the same package; ``VERSION`` guards against a
package that was replaced under a running server. What arrives is decoded into these types or
refused; nothing is unpickled. A message is a length in 4 bytes, big-endian, and so many bytes.
"""

from __future__ import annotations

import msgspec

from serving.capture.finished import Finished
from serving.engine.captured_rows import StoredDtype
from serving.framing import framed

VERSION = 1


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Fields in order behind the name of the type."""


class Begin(_Message, frozen=True):
    """The first message. Two descriptors come with it: of the ring's memory, see
    ``CapturedRows.mapped``, and of that for ``SharedCounts``."""

    version: int
    settings: str
    """The settings as JSON, secrets included."""
    shape: tuple[int, int, int]
    """Of the ring, [capacity, m + 1, H]."""
    dtype: StoredDtype
    layer_ids: tuple[int, ...]


class End(_Message, frozen=True):
    """Write what is queued and end; within ``timeout_s`` seconds."""

    timeout_s: float


class Opened(_Message, frozen=True):
    """Answer to ``Begin``: traces can be sent."""


class Refused(_Message, frozen=True):
    """Answer to ``Begin``: the settings cannot be used."""

    text: str


ToRecorder = Begin | Finished | End
FromRecorder = Opened | Refused

_encoder = msgspec.msgpack.Encoder(enc_hook=lambda value: value.item())  # of numpy's numbers


def frame(message: ToRecorder | FromRecorder) -> bytes:
    """A message as it is sent; see ``framing.framed``."""
    return framed(message, _encoder)
