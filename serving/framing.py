"""Messages as bytes: MessagePack with a length in 4 bytes, big-endian, in front.

What arrives is decoded into the types that are expected, or refused; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

_HEADER = 4


class ProtocolError(Exception):
    """The other side sent what is no message; the text says what."""


def framed(message: Any, encoder: msgspec.msgpack.Encoder) -> bytes:
    """A message as it is sent.

    Raises:
        ValueError: it is too long to be sent.
    """
    buffer = bytearray(_HEADER)
    encoder.encode_into(message, buffer, _HEADER)
    length = len(buffer) - _HEADER
    if length >= 1 << 8 * _HEADER:
        raise ValueError(f"{length} bytes are more than a message can have")
    buffer[:_HEADER] = length.to_bytes(_HEADER, "big")
    return bytes(buffer)


_T = TypeVar("_T")


class Frames(Generic[_T]):
    """Cuts received bytes into messages."""

    def __init__(self, kinds: Any, most_bytes: int | None = None) -> None:
        """
        Args:
            kinds: the union of what may arrive.
            most_bytes: longest message that is accepted; ``None``: any.
        """
        self._decoder: msgspec.msgpack.Decoder[_T] = msgspec.msgpack.Decoder(kinds)
        self._most_bytes = most_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[_T]:
        """The messages that are complete with these bytes.

        Raises:
            ProtocolError: the bytes are no such message.
        """
        self._data += data
        at = 0
        try:
            while (end := self._end(at)) is not None:
                message = self._decoder.decode(bytes(self._data[at + _HEADER : end]))
                at = end
                yield message
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a message cannot be read: {error}") from error
        finally:
            del self._data[:at]

    def _end(self, at: int) -> int | None:
        """End of the message that begins at ``at``; ``None``: it is not all there."""
        if len(self._data) < at + _HEADER:
            return None
        length = int.from_bytes(self._data[at : at + _HEADER], "big")
        if self._most_bytes is not None and length > self._most_bytes:
            raise ProtocolError(f"a message of {length} bytes, at most {self._most_bytes}")
        end = at + _HEADER + length
        return end if end <= len(self._data) else None
