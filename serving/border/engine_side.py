"""The engine's side of the border: one ``Line`` for each HTTP process."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.schema import Settings
from serving.border.in_process import Desk
from serving.border.messages import (
    MOST_BYTES,
    VERSION,
    Accepted,
    Answer,
    Ask,
    Cancel,
    Close,
    Failed,
    FromHttp,
    Hello,
    Ready,
    Submit,
    Welcome,
    raw,
    refused,
)
from serving.border.outbox import Outbox
from serving.framing import Frames, ProtocolError
from serving.requests import DrainingError, Output, QueueFullError

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 18
_SLOW = frozenset({"status", "swap", "rollback", "update_target"})
"""Questions that read the disk or wait for the engine."""


def welcome_for(desk: Desk, settings: Settings, tokenizer: Path) -> Welcome:
    """What every HTTP process is told first.

    Args:
        tokenizer: folder with the target's tokenizer.
    """
    return Welcome(
        version=VERSION,
        settings=settings.model_dump_json(),
        model=replace(desk.model, tokenizer=None),
        tokenizer=str(tokenizer),
        can_swap=desk.can_swap,
    )


class Line:
    """The connection to one HTTP process. When it ends, for whatever reason, the requests of that
    process are cancelled."""

    def __init__(self, sock: socket.socket, desk: Desk, welcome: Welcome, slowly: Executor) -> None:
        """
        Args:
            sock: connected to the process; the line closes it.
            slowly: runs what takes long, so that it delays no request.
        """
        self._sock = sock
        self._desk = desk
        self._welcome = welcome
        self._slowly = slowly
        self._inflight: set[str] = set()
        """Requests that this process submitted, did not cancel, and that have not finished."""
        self._gathered: list[Output] = []
        """Outputs of the step under way."""
        self._outbox = Outbox(sock, self._break)
        self._thread = threading.Thread(target=self._read, name="line", daemon=True)
        self._has_greeted = False
        self.is_ready = False
        """The process accepts connections."""
        self.is_over = False
        """Nothing can be sent or received any more, and all its requests are cancelled."""
        self.num_cancelled = 0
        """How many requests that was."""
        self.problem: str | None = None
        """Why it is over, if the process did not just end."""
        self.heard_s = time.monotonic()
        """When the process was last heard of."""

    def start(self) -> None:
        """Begin to read and to send."""
        self._outbox.start()
        self._thread.start()

    def give_up(self, why: str) -> None:
        """End the connection because of a fault of the process."""
        self._break(why)

    def close_http(self, left_s: float) -> None:
        """Let the process accept nothing more and end; see ``messages.Close``."""
        self._outbox.say(Close(left_s))

    def end(self) -> None:
        """Close the connection: the process ends its streams and itself."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes both threads
        self._outbox.close()
        for join in (self._outbox.join, self._thread.join):
            join(5.0)
        self._sock.close()

    # ---- the engine's thread -------------------------------------------------------------------

    def _on_output(self, output: Output) -> None:
        if output.finish_reason is not None:
            self._inflight.discard(output.request_id)
        if not self._gathered:
            self._desk.put_off(self._hand_over)
        self._gathered.append(output)

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._outbox.put(gathered)

    # ---- the reading thread --------------------------------------------------------------------

    def _read(self) -> None:
        frames: Frames[FromHttp] = Frames(FromHttp, MOST_BYTES)
        try:
            while data := self._sock.recv(_READ_BYTES):
                self.heard_s = time.monotonic()
                for message in frames.feed(data):
                    self._take(message)
        except (OSError, ProtocolError) as error:
            self._break(str(error))
        finally:
            self._outbox.close()
            left = self._inflight.copy()
            self._desk.cancel(left)
            self.num_cancelled = len(left)
            self.is_over = True

    def _break(self, why: str) -> None:
        """End the connection because of a fault."""
        self.problem = self.problem or why
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _take(self, message: FromHttp) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif not self._has_greeted:
            raise ProtocolError(f"{type(message).__name__} came before Hello")
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            self._cancel(message)
        elif isinstance(message, Ask):
            self._ask(message)
        elif isinstance(message, Ready):
            self.is_ready = True

    def _greet(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise ProtocolError(
                f"it speaks version {hello.version} of the messages, this process {VERSION}: the "
                f"package was replaced while the server ran; start the server again"
            )
        self._has_greeted = True
        self._outbox.say(self._welcome)

    def _submit(self, message: Submit) -> None:
        ids = {request.id for request in message.requests}
        if len(ids) < len(message.requests) or ids & self._inflight:
            raise ProtocolError("a request id was used twice")
        self._inflight |= ids  # first, because outputs may come before the call returns
        try:
            self._desk.submit(message.requests, self._on_output)
        except (QueueFullError, DrainingError, ValueError) as error:
            self._inflight -= ids
            self._outbox.say(refused(message.number, error))
        else:
            self._outbox.say(Accepted(message.number))

    def _cancel(self, message: Cancel) -> None:
        own = self._inflight.intersection(message.request_ids)
        self._inflight -= own
        self._desk.cancel(own)

    def _ask(self, message: Ask) -> None:
        if message.what in _SLOW:
            self._slowly.submit(self._answer, message)
        else:
            self._answer(message)

    def _answer(self, message: Ask) -> None:
        try:
            self._outbox.say(Answer(message.number, raw(self._found(message)())))
        except (ValueError, OSError) as error:
            self._outbox.say(Failed(message.number, str(error), True))
        except Exception:  # this thread's outermost loop: one answer fails, the others come
            log.exception("cannot answer %s", message.what)
            self._outbox.say(Failed(message.number, f"{message.what} failed; see the log", False))

    def _found(self, message: Ask) -> Callable[[], Any]:
        desk = self._desk
        answers: dict[str, Callable[[], Any]] = {
            "complaint": desk.complaint,
            "figures": desk.figures,
            "policy": desk.policy_figures,
            "history": lambda: desk.history(message.since_unix_s),
            "status": desk.drafter_status,
            "swap": lambda: desk.swap(message.version, message.drafter),
            "rollback": lambda: desk.rollback(message.drafter),
            "drain": desk.drain,
            "target": desk.target_status,
            "update_target": lambda: desk.update_target(message.path),
        }
        return answers[message.what]
