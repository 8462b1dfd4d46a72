"""``capture.redact``: a function that sees each trace before it leaves the server.

It belongs to the operator and runs on the recorder's thread, never on the engine's. What it raises
is counted and not shown: a message may quote the text that it should have removed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import replace

from buffer.codec import decode_trace, encode_trace
from buffer.interface import Payload
from buffer.records import Trace
from configs.capture import CaptureSettings
from serving.capture.recorder import EncodeTrace, WithheldError

log = logging.getLogger(__name__)

Redact = Callable[[Trace], Trace | None]
"""Returns the trace, changed or not, or ``None`` to keep it back."""


def load_redact(spec: str) -> Redact:
    """The function that ``module:function`` names.

    Raises:
        ValueError: there is no such function; says what is missing.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(f"capture.redact {spec!r} must look like 'module:function'")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the operator's module raises, it cannot be used
        raise ValueError(
            f"capture.redact {spec!r} cannot be used: importing {module!r} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"capture.redact {spec!r} cannot be used: {module!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"capture.redact {spec!r} cannot be used: it is no function")
    redact: Redact = found
    return redact


def redaction_of(settings: CaptureSettings) -> Redaction | None:
    """What ``capture.redact`` asks for; ``None``: nothing.

    Raises:
        ValueError: there is no such function; says what is missing.
    """
    return None if settings.redact is None else Redaction(load_redact(settings.redact))


class Redaction:
    """Applies the function to encoded traces."""

    def __init__(self, redact: Redact) -> None:
        self._redact = redact
        self._said: set[str] = set()
        """Kinds of errors that were logged."""

    def of(self, encode_trace: EncodeTrace) -> EncodeTrace:
        """The same trace as the function leaves it."""

        def encode() -> Payload | None:
            record = encode_trace()
            return None if record is None else self._redacted(record)

        return encode

    def _redacted(self, record: Payload) -> Payload:
        """
        Raises:
            WithheldError: the function kept the trace back or failed, or what it returned is no
                sound trace.
        """
        before = decode_trace(record)
        try:
            after = self._redact(before)
            if after is None:
                raise WithheldError
            # What tells traces apart, and whose they are, is not the function's to change.
            return encode_trace(
                replace(
                    after,
                    producer=before.producer,
                    epoch=before.epoch,
                    seq=before.seq,
                    target_fingerprint=before.target_fingerprint,
                )
            )
        except WithheldError:
            raise
        except BaseException as error:  # the operator's code: whatever it raises drops the trace
            self._say(type(error).__name__)
            raise WithheldError from None

    def _say(self, kind: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning(
                "capture.redact raised %s: the trace is dropped, and so are others like it; all "
                'are counted (traces_total{result="withheld"})',
                kind,
            )
