"""The engine as an HTTP process sees it: a ``RunningServer`` behind a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from serving.border.messages import (
    BEAT_S,
    MOST_BYTES,
    VERSION,
    Accepted,
    Alive,
    Answer,
    Ask,
    Cancel,
    Close,
    Failed,
    FromEngine,
    FromHttp,
    Hello,
    Outputs,
    Question,
    Ready,
    Refused,
    Submit,
    Welcome,
    error_of,
    frame,
)
from serving.framing import Frames, ProtocolError
from serving.requests import (
    DrainingError,
    EngineFigures,
    EngineGoneError,
    OnOutput,
    Output,
    QueueFullError,
    Request,
)
from serving.served_model import ServedModel

T = TypeVar("T")
_GONE = "the engine's process is gone"


class Wire(asyncio.Protocol):
    """Messages over one socket, on the event loop."""

    def __init__(self) -> None:
        self._frames: Frames[FromEngine] = Frames(FromEngine)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        """Submissions and questions without an answer, by number."""
        self._num_asked = 0
        self._takers: dict[str, OnOutput] = {}
        """Who gets the outputs of a request that has not finished."""
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self.is_gone = False
        """The engine's process has ended, or the connection to it."""
        self.close_s: float | None = None
        """Time that responses may still take; ``None``: the server goes on."""

    @classmethod
    async def over(cls, sock: socket.socket) -> tuple[Wire, Welcome]:
        """Connect and introduce oneself.

        Raises:
            EngineGoneError: the engine's process ended meanwhile.
            ProtocolError: it has another version.
        """
        _, wire = await asyncio.get_running_loop().create_connection(cls, sock=sock)
        wire.send(Hello(VERSION))
        welcome = await wire._welcome
        wire._beat()
        if welcome.version != VERSION:
            raise ProtocolError(
                f"the engine's process speaks version {welcome.version} of the messages, this one "
                f"{VERSION}"
            )
        return wire, welcome

    def send(self, message: FromHttp) -> None:
        """Send a message. Returns at once.

        Raises:
            EngineGoneError: there is nobody to send it to.
        """
        if self.is_gone or self._transport is None:
            raise EngineGoneError(_GONE)
        self._transport.write(frame(message))

    async def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        """See ``RunningServer``."""
        number, answer = self._expect()
        try:
            data = frame(Submit(number, list(requests)))
        except OverflowError:
            self._waiting.pop(number, None)
            raise ValueError("prompt holds a token id of more than 64 bits") from None
        if len(data) > MOST_BYTES:
            raise ValueError(f"the request takes {len(data)} bytes, at most {MOST_BYTES} do")
        ids = [request.id for request in requests]
        self._takers |= dict.fromkeys(ids, on_output)
        try:
            if self.is_gone or self._transport is None:
                raise EngineGoneError(_GONE)
            self._transport.write(data)
            await answer
        except (QueueFullError, DrainingError, ValueError):  # none of them was queued
            for one in ids:
                self._takers.pop(one, None)
            raise
        except BaseException:
            self.cancel(ids)
            raise
        finally:
            self._waiting.pop(number, None)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """See ``RunningServer``."""
        left = [one for one in request_ids if self._takers.pop(one, None) is not None]
        if left and not self.is_gone:
            self.send(Cancel(left))

    async def ask(
        self,
        what: Question,
        kind: type[T],
        *,
        version: int | None = None,
        since_unix_s: float = 0.0,
        path: str = "",
        drafter: str | None = None,
    ) -> T:
        """An answer of the engine's process.

        Raises:
            EngineGoneError: it is gone.
            ValueError: it refuses.
            RuntimeError: it failed.
        """
        number, answer = self._expect()
        try:
            self.send(Ask(number, what, version, since_unix_s, path, drafter))
            return msgspec.msgpack.decode(await answer, type=kind)
        finally:
            self._waiting.pop(number, None)

    def _beat(self) -> None:
        """Tell the engine's process again and again that this one's event loop turns."""
        if not self.is_gone:
            self.send(Alive())
            asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _expect(self) -> tuple[int, asyncio.Future[Any]]:
        self._num_asked += 1
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._num_asked] = answer
        return self._num_asked, answer

    # ---- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """End everything with an error that says why."""
        self.is_gone = True
        for answer in (self._welcome, *self._waiting.values()):
            if not answer.done():
                answer.set_exception(EngineGoneError(_GONE))
                answer.exception()  # nobody may be waiting for it
        takers, self._takers = self._takers, {}
        for request_id, on_output in takers.items():
            on_output(Output.engine_gone(request_id))

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Accepted):
            self._settle(message.number, None)
        elif isinstance(message, Refused):
            self._settle(message.number, error_of(message))
        elif isinstance(message, Answer):
            self._settle(message.number, bytes(message.value))
        elif isinstance(message, Failed):
            error = ValueError if message.is_refusal else RuntimeError
            self._settle(message.number, error(message.text))
        elif isinstance(message, Close):
            self.close_s = message.left_s
        elif not self._welcome.done():
            self._welcome.set_result(message)

    def _deliver(self, output: Output) -> None:
        taker = self._takers.get(output.request_id)
        if taker is None:  # cancelled here; the engine did not know yet
            return
        if output.finish_reason is not None:
            del self._takers[output.request_id]
        taker(output)

    def _settle(self, number: int, result: Any) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)


class RemoteServer:
    """A ``serving.http.face.RunningServer``: the engine of another process."""

    def __init__(self, wire: Wire, model: ServedModel, can_swap: bool) -> None:
        self._wire = wire
        self._model = model
        self._can_swap = can_swap

    @property
    def model(self) -> ServedModel:
        return self._model

    @property
    def can_swap(self) -> bool:
        return self._can_swap

    async def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        await self._wire.submit(requests, on_output)

    def cancel(self, request_ids: Iterable[str]) -> None:
        self._wire.cancel(request_ids)

    def ready(self) -> None:
        """Tell the engine's process that connections are accepted."""
        self._wire.send(Ready())

    async def drain(self) -> int:
        return await self._wire.ask("drain", int)

    async def complaint(self) -> str | None:
        return await self._wire.ask("complaint", str | None)  # type: ignore[arg-type]

    async def figures(self) -> EngineFigures:
        return await self._wire.ask("figures", EngineFigures)

    async def policy_figures(self) -> dict[str, Any]:
        return await self._wire.ask("policy", dict[str, Any])

    async def history(self, since_unix_s: float) -> list[list[float]]:
        return await self._wire.ask("history", list[list[float]], since_unix_s=since_unix_s)

    async def drafter_status(self) -> dict[str, Any]:
        return await self._wire.ask("status", dict[str, Any])

    async def swap(self, version: int | None, drafter: str | None = None) -> dict[str, Any]:
        return await self._wire.ask("swap", dict[str, Any], version=version, drafter=drafter)

    async def rollback(self, drafter: str | None = None) -> dict[str, Any]:
        return await self._wire.ask("rollback", dict[str, Any], drafter=drafter)

    async def target_status(self) -> dict[str, Any]:
        return await self._wire.ask("target", dict[str, Any])

    async def update_target(self, path: str) -> dict[str, Any]:
        return await self._wire.ask("update_target", dict[str, Any], path=path)
