"""What the trainer reports: every event in ``log.jsonl``, the current state in ``status.json``, and
log lines for people."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from buffer.files import OWNER_FOLDER, open_regular
from configs.logs import Outage

log = logging.getLogger(__name__)

STATUS_EVERY_S = 0.5
"""Seconds between two writes of a status whose state is the same."""
LINE_EVERY_S = 10.0
"""Seconds between two log lines while the trainer learns, or keeps waiting for the same thing."""


class Journal:
    """Appends events, replaces the status, and logs both. Readers never see half a status."""

    def __init__(
        self,
        folder: Path,
        hears: Callable[[str, dict[str, Any]], None] | None = None,
        drafter: str = "",
    ):
        """
        Args:
            hears: told of every event and status; must not wait.
            drafter: kind that log lines name; empty: none.
        """
        # No text is in these files, but names of traces are: they are their owner's alone.
        folder.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
        self._status_path = folder / "status.json"
        self._log_path = folder / "log.jsonl"
        self._lines = _Lines(f"{drafter}: " if drafter else "")
        self._hears = hears or (lambda name, values: None)
        self._last_status: dict[str, Any] = {}
        # One each: on a full disk one file may still be written while the other is not.
        self._outages = {
            path: Outage(f"write {path}") for path in (self._log_path, self._status_path)
        }
        self._status_s = -math.inf
        """Monotonic time of the last status."""

    def event(self, name: str, /, **values: Any) -> None:
        """Append ``{"event": name, "unix_ms": now, ...}``; NaN and infinities become null."""
        line = {"event": name, "unix_ms": int(time.time() * 1000), **values}
        text = json.dumps(_plain(line), allow_nan=False).encode() + b"\n"
        self._write(self._log_path, lambda: self._append(text))
        self._lines.event(name, values)
        self._hears(name, values)

    def status_is_due(self, state: str) -> bool:
        """The state is another than in ``status.json``, or that is ``STATUS_EVERY_S`` old."""
        age_s = time.monotonic() - self._status_s
        return age_s >= STATUS_EVERY_S or state != self._last_status.get("state")

    def status(self, values: dict[str, Any]) -> None:
        """Replace ``status.json``. A power cut may bring back an older one."""
        self._status_s = time.monotonic()
        body = {"unix_ms": int(time.time() * 1000), "pid": os.getpid(), **values}
        text = json.dumps(_plain(body), allow_nan=False, indent=1)
        self._write(self._status_path, lambda: self._replace_status(text))
        self._last_status = values
        self._lines.status(values)
        self._hears("status", values)

    def failed(self, error: Exception) -> None:
        """Record that the trainer ends because of ``error``. The caller logs it."""
        text = f"{type(error).__name__}: {error}"
        self.event("failed", text=text)
        self.status({**self._last_status, "state": f"failed: {text}"})

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        """A full disk costs the report, not the trainer."""
        outage = self._outages[path]
        try:
            write()
        except OSError as error:
            if line := outage.failed(error.strerror or str(error)):
                log.error("%s; training continues", line)
        else:
            if line := outage.ended():
                log.info(line)

    def _append(self, text: bytes) -> None:
        if self._log_path.exists() and not _ends_a_line(self._log_path):
            text = b"\n" + text  # ends the half line that a killed trainer or a full disk left
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with open(open_regular(self._log_path, flags, 0o666, follow=True), "ab") as file:
            file.write(text)

    def _replace_status(self, text: str) -> None:
        temporary = self._status_path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._status_path)


class _Lines:
    """Log lines for events, and a summary every ``LINE_EVERY_S`` in between."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        """Before each line."""
        self._window_s = time.monotonic()
        """Start of the current window, on the monotonic clock."""
        self._num_updates = 0
        """Updates in the window."""
        self._num_rows = 0
        self._awaited: str | None = None
        """What the trainer waited for, when that was last logged."""
        self._reasons: set[str] = set()
        """Reasons for which a trace was refused so far."""

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Log an event; updates are only counted."""
        if name == "update":
            self._num_updates += values["updates"]
            self._num_rows += values["rows"]
        elif name == "refused":
            self._refused(values)
        elif name in _TEXTS:
            level, text = _TEXTS[name]
            log.log(level, self._prefix + text, values)

    def status(self, values: dict[str, Any]) -> None:
        """Log what the trainer waits for when that changes; else a line for each full window."""
        state: str = values["state"]
        if not state.startswith(("waiting", "training")):
            return
        awaited = state.partition(":")[0] if state.startswith("waiting") else None
        if awaited is not None and awaited != self._awaited:
            log.info(self._prefix + state)
            self._awaited = awaited
        elif time.monotonic() - self._window_s >= LINE_EVERY_S:
            if self._num_updates:
                log.info(self._prefix + self._learning(values))
            elif awaited is not None:
                log.info(self._prefix + state)
            self._begin_window()

    def _refused(self, values: dict[str, Any]) -> None:
        """Warn about the first trace refused for a reason; thousands may follow for the same."""
        level = logging.DEBUG if values["reason"] in self._reasons else logging.WARNING
        self._reasons.add(values["reason"])
        log.log(
            level,
            self._prefix + "trace %(trace)s is not used: %(text)s; status.json counts further "
            "traces refused for the reason %(reason)r",
            values,
        )

    def _learning(self, values: dict[str, Any]) -> str:
        seconds = time.monotonic() - self._window_s
        return (
            f"step {values['step']}: {self._num_updates} updates and "
            f"{self._num_rows / seconds:.0f} rows/s over {seconds:.0f} s, "
            f"loss {values['loss']:.4f}, {values['traces']['read']} traces read, "
            f"version {values['version']}"
        )

    def _begin_window(self) -> None:
        self._window_s = time.monotonic()
        self._num_updates = self._num_rows = 0


_TEXTS = {
    "started": (logging.INFO, "training begins from version %(version)d"),
    "resumed": (
        logging.INFO,
        "resumed at step %(step)d: version %(version)d, %(traces)d traces read back, "
        "%(traces_gone)d no longer in the buffer; %(traces_again)d that a damaged checkpoint had "
        "learnt are trained on again, %(traces_again_gone)d of its are gone",
    ),
    "not_trained_again": (logging.WARNING, "%(text)s"),
    "gate": (logging.INFO, "gate at step %(step)d: %(reason)s; parent version %(parent)d"),
    "published": (logging.INFO, "published version %(version)d, trained from %(parent)d"),
    "publish_failed": (logging.ERROR, "the new version could not be published: %(text)s"),
    "policy_waits": (logging.INFO, "%(text)s"),
    "policy_gate": (
        logging.INFO,
        "policy %(kind)s fitted to %(steps)d steps of versions %(oldest)d to %(newest)d of "
        "%(drafter)s in %(seconds).1f s: %(text)s",
    ),
    "policy_failed": (logging.ERROR, "the policy %(kind)s: %(text)s"),
    "policy_published": (
        logging.INFO,
        "published version %(version)d: the weights of %(parent)d with a new network for the "
        "policy %(kind)s",
    ),
    "policy_rolled_back": (
        logging.WARNING,
        "the server rolled back version %(rejected)d, which brought a policy alone: the network of "
        "version %(version)d is taken again",
    ),
    "deleted": (
        logging.INFO,
        "a tenant was deleted: %(traces)d traces are dropped from memory",
    ),
    "rolled_back": (
        logging.WARNING,
        "the server rolled back version %(rejected)d; training goes on from version %(version)d",
    ),
    "target_changed": (
        logging.WARNING,
        "the target's weights were replaced by those in %(folder)s: %(traces)d traces of the "
        "former ones are dropped, and what was learnt since version %(version)d is kept",
    ),
    "target_not_followed": (
        logging.ERROR,
        "the target's weights were replaced by those in %(folder)s, which cannot be followed: "
        "%(text)s",
    ),
    "buffer_away": (logging.WARNING, "%(text)s"),
    "buffer_back": (logging.INFO, "%(text)s"),
    "paused": (logging.INFO, "learning pauses until acceptance falls: %(text)s"),
    "drift": (
        logging.WARNING,
        "acceptance of version %(version)d has fallen on live traffic (learning was paused: "
        "%(woke)s)",
    ),
    "woke": (logging.INFO, "%(text)s"),
    "rate_reset": (logging.INFO, "%(text)s"),
    "restored": (logging.WARNING, "weights restored from %(source)s: %(text)s"),
    "checkpoint": (logging.DEBUG, "checkpoint %(name)s: %(bytes)d bytes in %(seconds).1f s"),
    "checkpoint_failed": (logging.ERROR, "the checkpoint could not be written: %(text)s"),
    "checkpoint_unreadable": (
        logging.ERROR,
        "weights are restored from the published version instead of a checkpoint: %(text)s",
    ),
    "stopped": (logging.INFO, "stopped at step %(step)d"),
}
"""Event -> level and text of its log line, filled in with the event's values."""


def text_of(event: Mapping[str, Any]) -> str | None:
    """The log line of an event in ``log.jsonl``; ``None`` if it has none."""
    known = _TEXTS.get(str(event.get("event")))
    if known is None:
        return None
    try:
        return known[1] % event
    except (KeyError, TypeError, ValueError):  # written by another version of this program
        return json.dumps(dict(event))


def _ends_a_line(path: Path) -> bool:
    content_end = path.stat().st_size
    with open(open_regular(path, follow=True), "rb") as file:
        file.seek(max(content_end - 1, 0))
        return file.read(1) in (b"\n", b"")


def _plain(value: Any) -> Any:
    """The value with NaN and infinities, which JSON cannot express, replaced by ``None``."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
