"""Messages between the engine's process and an HTTP process, as MessagePack.

Both sides run the same version of this package: the engine's process starts the others. ``VERSION``
guards against a package that was replaced under a running server. What arrives is decoded into
these types or refused; nothing is unpickled. A message is a length in 4 bytes, big-endian, and so
many bytes.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from serving.framing import framed
from serving.requests import DrainingError, Output, QueueFullError, Request
from serving.served_model import ServedModel

VERSION = 4
MOST_BYTES = 64 << 20
"""Longest message that the engine's process accepts. A job of 8 choices with prompts of a million
tokens takes 40 MB."""
BEAT_S = 1.0
"""Time between two ``Alive`` of an HTTP process."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Fields in order behind the name of the type."""


# ---- from HTTP to the engine --------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """The first message."""

    version: int


class Ready(_Message, frozen=True):
    """It accepts connections."""


class Alive(_Message, frozen=True):
    """Its event loop turns."""


class Submit(_Message, frozen=True):
    """All requests of one job; answered with ``Accepted`` or ``Refused``."""

    number: int
    """Chosen by the sender, for the answer."""
    requests: list[Request]


class Cancel(_Message, frozen=True):
    """End requests early. There is no answer."""

    request_ids: list[str]


Question = Literal[
    "complaint", "figures", "policy", "history", "status", "swap", "rollback", "drain",
    "target", "update_target",
]  # fmt: skip


class Ask(_Message, frozen=True):
    """A question or an order; answered with ``Answer`` or ``Failed``."""

    number: int
    what: Question
    version: int | None = None
    """Of a swap."""
    since_unix_s: float = 0.0
    """Of the history."""
    path: str = ""
    """Of an update of the target."""
    drafter: str | None = None
    """Of a swap or rollback."""


FromHttp = Hello | Ready | Alive | Submit | Cancel | Ask


# ---- from the engine to HTTP --------------------------------------------------------------------


class Welcome(_Message, frozen=True):
    """Answer to ``Hello``: all that an HTTP process needs."""

    version: int
    settings: str
    """The settings as JSON, secrets included."""
    model: ServedModel
    """Without its tokenizer."""
    tokenizer: str
    """Folder to load it from."""
    can_swap: bool


class Accepted(_Message, frozen=True):
    """All requests of a ``Submit`` are queued."""

    number: int


Refusal = Literal["queue_full", "draining", "invalid"]


class Refused(_Message, frozen=True):
    """None of the requests of a ``Submit`` is queued."""

    number: int
    why: Refusal
    text: str


class Outputs(_Message, frozen=True):
    """New outputs, those of one request in order."""

    outputs: list[Output]


class Answer(_Message, frozen=True):
    """Answer to an ``Ask``; the type of ``value`` follows from the question."""

    number: int
    value: msgspec.Raw


class Failed(_Message, frozen=True):
    """An ``Ask`` failed."""

    number: int
    text: str
    is_refusal: bool
    """For the caller to read; otherwise a fault of the server."""


class Close(_Message, frozen=True):
    """Accept no more connections; end once responses are written, at the latest after
    ``left_s``."""

    left_s: float


FromEngine = Welcome | Accepted | Refused | Outputs | Answer | Failed | Close

# ---- bytes --------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # of a status; all else is typed


def frame(message: FromHttp | FromEngine) -> bytes:
    """A message as it is sent; see ``framing.framed``."""
    return framed(message, _encoder)


def raw(value: Any) -> msgspec.Raw:
    """The value of an ``Answer``."""
    return msgspec.Raw(_encoder.encode(value))


# ---- refusals -----------------------------------------------------------------------------------


def refused(number: int, error: Exception) -> Refused:
    """The message for an error that ``submit`` may raise."""
    if isinstance(error, QueueFullError):
        return Refused(number, "queue_full", str(error))
    if isinstance(error, DrainingError):
        return Refused(number, "draining", str(error))
    assert isinstance(error, ValueError)
    return Refused(number, "invalid", str(error))


def error_of(message: Refused) -> Exception:
    """The error that ``refused`` was made of."""
    kinds = {"queue_full": QueueFullError, "draining": DrainingError, "invalid": ValueError}
    return kinds[message.why](message.text)
