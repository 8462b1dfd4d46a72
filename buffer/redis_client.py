"""A client of one Redis or Valkey server, or cluster."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from buffer.interface import ServiceAwayError
from buffer.redis_url import RedisOptions, connection_arguments

Command = Sequence[Any]


class RedisClient:
    """Commands to a server; may be used by several threads. Connects when it is first used."""

    def __init__(self, options: RedisOptions) -> None:
        self.options = options
        self._redis: Any = None

    @property
    def redis(self) -> Any:
        """The library's client.

        Raises:
            redis.RedisError: the cluster cannot be reached.
        """
        if self._redis is None:
            arguments = dict(connection_arguments(self.options))
            # One try: whoever calls knows which commands may be repeated. The library would repeat
            # any whose answer was lost.
            arguments |= {"retry": Retry(NoBackoff(), 0), "protocol": 2}
            if self.options.cluster:
                self._redis = redis.RedisCluster(**arguments)
            else:
                self._redis = redis.Redis(**arguments, db=self.options.db)
        return self._redis

    def call(self, *command: Any, **parsing: Any) -> Any:
        """Execute one command.

        Args:
            parsing: what the library wants to know to parse the answer.

        Raises:
            ServiceAwayError: there is no answer, or an error.
        """
        with self.errors():
            return self.redis.execute_command(*command, **parsing)

    def together(self, commands: Iterable[Command]) -> list[Any]:
        """Execute commands in one transaction, all of them or none.

        Returns:
            Answers in order. That a single command failed is among them, as an exception.

        Raises:
            ServiceAwayError: there is no answer, or the server refused all of them.
        """
        all_commands = list(commands)
        answers = self._pipeline(all_commands, transaction=True, raise_on_error=False)
        if self.options.cluster:
            return list(map(_parsed, all_commands, answers))
        return answers

    def at_once(self, commands: Iterable[Command]) -> list[Any]:
        """Execute commands in one round trip.

        Raises:
            ServiceAwayError: there is no answer, or one of them failed.
        """
        return self._pipeline(commands, transaction=False, raise_on_error=True)

    def _pipeline(
        self, commands: Iterable[Command], transaction: bool, raise_on_error: bool
    ) -> list[Any]:
        with self.errors(), self.redis.pipeline(transaction=transaction) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = pipe.execute(raise_on_error=raise_on_error)
            return answers

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the library raises into a ``ServiceAwayError``."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            if isinstance(error, ServiceAwayError):
                raise
            raise self.away(said_by_server(error)) from None

    def away(self, problem: str) -> ServiceAwayError:
        """The error that says so, and where."""
        return ServiceAwayError(errno.EIO, f"{self.options.location}: {problem}")

    def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                self._redis.close()


def _parsed(command: Command, answer: Any) -> Any:
    """What the library makes of an answer, but not in a transaction of a cluster."""
    if isinstance(answer, Exception) or answer is None:
        return answer
    if command[0] in ("XRANGE", "XREVRANGE"):
        return _entries(answer)
    if command[0] == "XREADGROUP":
        return [[key, _entries(entries)] for key, entries in answer]
    if command[0] in ("XINFO GROUPS", "XINFO CONSUMERS"):
        found = map(_pairs, answer)
        return [{name.decode(): value for name, value in one.items()} for one in found]
    return _pairs(answer) if command[0] == "HGETALL" else answer


def _entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return [(entry_id, _pairs(fields)) for entry_id, fields in answer]


def _pairs(answer: Any) -> dict[bytes, Any]:
    return dict(zip(answer[::2], answer[1::2], strict=True))


def said_by_server(error: Exception) -> str:
    """What an error says, without the command: its arguments may be somebody's text."""
    return str(error).rpartition("of pipeline caused error: ")[2]
