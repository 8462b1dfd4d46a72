"""How a buffer on Kafka is addressed and reached: its URL, its topics and its clients.

    kafka://[USER@]HOST:PORT[,HOST:PORT...]/PREFIX[?OPTION=VALUE&...]

``kafkas://`` is the same over TLS. ``PREFIX`` begins the names of the topics, which are created
when somebody first writes to them and nobody has made them before:

    PREFIX.traces    one message per record, all of a writer in one partition
    PREFIX.parts     pieces of records that are too large for one message
    PREFIX.weights   one partition: what happened to the versions, see ``kafka_weights.py``
    PREFIX.files     one partition: the content of the versions, in pieces
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

try:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
    from kafka.errors import (
        KafkaError,
        KafkaTimeoutError,
        RetriableError,
        TopicAlreadyExistsError,
        TopicAuthorizationFailedError,
    )
    from kafka.net.compat import KafkaNetClient
except ImportError as error:
    raise ValueError(
        "buffer.url names Kafka, but its client is not installed: pip install "
        "'slipstream-serving[kafka]'"
    ) from error
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from buffer.interface import ServiceAwayError
from configs.urls import shown_option, shown_option_name, shown_url

PARTS_HEADER = ("slipstream.parts", b"1")
"""Marks a message that says where the pieces of its record are."""
MESSAGE_ROOM = 512
"""Bytes of a message beyond its value: key, headers and the frame of its batch."""

_URL = re.compile(r"(kafkas?)://(?:([^@/?#]*)@)?([^@/?#]+)/([^/?#]+)(?:\?([^#]*))?")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,100}")
_CLIENT = "slipstream"
_MAX_ERROR_LETTERS = 160

# The client reports everything as errors too; its own log would repeat each failed attempt to
# connect and, at level DEBUG, print the records.
logging.getLogger("kafka").setLevel(logging.CRITICAL)


class KafkaOptions(BaseModel):
    """What may follow the ``?`` of the URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partitions: int = Field(4, ge=1, le=1024)
    """Partitions of the trace topic, where it is created: at most as many readers share a group."""
    replication: int | None = Field(None, ge=1, le=32)
    """Copies of each topic, where it is created. ``None``: the broker's default."""
    compression: Literal["none", "gzip", "lz4", "snappy", "zstd"] = "none"
    """Of traces. Hidden rows hardly shrink, so it costs more than it saves on most networks."""
    security: Literal["plaintext", "ssl"] = "plaintext"
    """``ssl``: TLS, which ``kafkas://`` implies."""
    mechanism: Literal["scram-sha-512", "scram-sha-256", "plain"] = "scram-sha-512"
    """How the URL's user logs in."""
    password_env: str = "KAFKA_PASSWORD"
    """Environment variable with the user's password, which belongs into no URL."""
    ca: str | None = None
    """File with the certificates to trust. ``None``: those of the system."""
    cert: str | None = None
    """File with the client's certificate, for brokers that ask for one."""
    key: str | None = None
    """File with its private key."""
    timeout_s: float = Field(5.0, ge=0.1, le=300)
    """Seconds after which a request without an answer has failed."""
    session_s: float = Field(10.0, ge=1, le=1800)
    """Seconds after which a silent member of a group is taken for dead."""
    message_bytes: int = Field(1 << 20, ge=4096, le=64 << 20)
    """Largest message; longer records are split. A topic that is created allows it; where the
    broker allows less, less is sent."""
    batch_bytes: int = Field(1 << 20, ge=0, le=64 << 20)
    """Small records are sent together, up to this many bytes."""
    in_flight_bytes: int = Field(16 << 20, ge=1 << 16)
    """Records handed to the client and not acknowledged yet."""
    spool_bytes: int = Field(256 << 20, ge=1 << 16)
    """Records that wait in memory while the brokers are away or slow; the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class KafkaAddress:
    """A parsed URL. Holds no password."""

    servers: tuple[str, ...]
    """HOST:PORT of brokers to ask for the others."""
    prefix: str
    user: str | None
    options: KafkaOptions

    @property
    def location(self) -> str:
        """For messages."""
        scheme = "kafkas" if self.options.security == "ssl" else "kafka"
        return f"{scheme}://{','.join(self.servers)}/{self.prefix}"


def parse_url(url: str) -> KafkaAddress:
    """Take a URL apart.

    Raises:
        ValueError: it does not follow the form above; the message shows no password.
    """
    shown = shown_url(url)
    form = "kafka://[USER@]HOST:PORT[,HOST:PORT]/PREFIX[?OPTION=VALUE&...]"
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"buffer.url {shown!r} must look like {form}")
    scheme, login, hosts, prefix, query = match.groups()
    if login is not None and ":" in login:
        raise ValueError(
            f"buffer.url {shown!r} holds a password, which ends in logs and listings of processes: "
            f"leave the user in it, and put the password into the environment variable "
            f"KAFKA_PASSWORD, or into the one that the option password_env names"
        )
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ValueError(f"buffer.url {shown!r}: a broker is not named as HOST:PORT")
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"buffer.url {shown!r}: the prefix must match {_PREFIX.pattern}")
    options = _options(shown, query or "", scheme == "kafkas")
    user = unquote(login) if login else None
    if user is not None and options.mechanism == "plain" and options.security != "ssl":
        raise ValueError(
            f"buffer.url {shown!r}: mechanism=plain would send the password readable; use "
            f"kafkas:// or another mechanism"
        )
    return KafkaAddress(tuple(hosts.split(",")), prefix, user, options)


def _options(shown: str, query: str, is_tls: bool) -> KafkaOptions:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        pairs = None
    if pairs is None:
        raise ValueError(f"buffer.url {shown!r}: behind the '?' must be OPTION=VALUE&...")
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError(f"buffer.url {shown!r} gives an option twice")
    if is_tls and given.setdefault("security", "ssl") != "ssl":
        raise ValueError(f"buffer.url {shown!r}: kafkas:// means security=ssl")
    try:
        return KafkaOptions.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_input=False, include_context=False)[0]
    name, known = shown_option_name(str(found["loc"][0])), ", ".join(KafkaOptions.model_fields)
    raise ValueError(f"buffer.url {shown!r}: option {name!r}: {found['msg']}; known are {known}")


class KafkaLink:
    """Makes clients for one address, and topics where they are missing. Connects only when asked;
    what it makes belongs to the caller."""

    def __init__(self, address: KafkaAddress) -> None:
        self.address = address
        self.options = address.options
        self._known: set[str] = set()
        """Topics that exist."""
        self._lock = threading.Lock()

    def topic(self, name: str) -> str:
        """Full name of ``traces``, ``parts``, ``weights`` or ``files``."""
        return f"{self.address.prefix}.{name}"

    def group(self, name: str) -> str:
        """Full name of a group of readers."""
        return f"{self.address.prefix}.{name}"

    def producer(self, owner: object, **settings: Any) -> KafkaProducer:
        """An idempotent producer that waits for all copies, closed with its owner at the latest."""
        timeout_ms = self.timeout_ms
        client = _made(
            KafkaProducer,
            **self._common(),
            **settings,
            acks="all",
            enable_idempotence=True,
            max_request_size=(64 << 20) + MESSAGE_ROOM,
            max_block_ms=timeout_ms,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        weakref.finalize(owner, _close_aside, close_now, client).atexit = False
        return client

    def consumer(self, owner: object, **settings: Any) -> KafkaConsumer:
        """A consumer that commits nothing by itself, closed with its owner at the latest."""
        client = _made(
            KafkaConsumer,
            **self._common(),
            **{"metadata_max_age_ms": 30_000, "fetch_max_wait_ms": 50, **settings},
            enable_auto_commit=False,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        weakref.finalize(owner, _close_aside, close_consumer, client).atexit = False
        return client

    @contextlib.contextmanager
    def admin(self) -> Iterator[KafkaAdminClient]:
        """A client for topics and groups, for a moment."""
        client = _made(KafkaAdminClient, **self._common())
        try:
            yield client
        finally:
            sockets = _sockets(client._client)
            client.close()
            _close_all(sockets)

    def ensure_topic(self, name: str, num_partitions: int, configs: dict[str, str]) -> None:
        """Create a topic unless it exists.

        Args:
            name: without the prefix.
            num_partitions: where it is created.
            configs: its settings where it is created.

        Raises:
            OSError: it cannot be created.
        """
        with self._lock:
            if name in self._known:
                return
            with kafka_errors(f"topic {self.topic(name)} cannot be created"), self.admin() as admin:
                _create(admin, self.topic(name), num_partitions, self.options.replication, configs)
            self._known.add(name)

    def forget_topics(self) -> None:
        """Look again whether topics exist."""
        with self._lock:
            self._known.clear()

    def message_limit(self, name: str) -> int:
        """Largest value that a message of this topic may have, bytes."""
        from kafka.admin import ConfigResource

        topic = self.topic(name)
        allowed = None
        with (
            contextlib.suppress(KafkaError, KeyError, TypeError, ValueError),
            self.admin() as admin,
        ):
            found = admin.describe_configs([ConfigResource("TOPIC", topic)], config_filter="all")
            allowed = int(found["topic"][topic]["max.message.bytes"]["value"])
        most = self.options.message_bytes
        return (most if allowed is None else min(most, allowed)) - MESSAGE_ROOM

    @property
    def timeout_ms(self) -> int:
        return round(self.options.timeout_s * 1000)

    def _common(self) -> dict[str, Any]:
        """Settings of every client."""
        timeout_ms = self.timeout_ms
        return {
            "bootstrap_servers": list(self.address.servers),
            "client_id": _CLIENT,
            "request_timeout_ms": timeout_ms,
            "bootstrap_timeout_ms": timeout_ms,
            "reconnect_backoff_ms": 50,
            "reconnect_backoff_max_ms": 1000,  # with jitter, by the client
            **_security(self.address),
        }


def _made(kind: Callable[..., Any], **settings: Any) -> Any:
    """A new client. If the brokers cannot be reached, the library raises and leaves a thread behind
    that tries for ever: one for each attempt of an outage."""
    begun = list[Any]()

    def connections(**given: Any) -> Any:
        begun.append(KafkaNetClient(**given))
        return begun[-1]

    try:
        return kind(**settings, kafka_client=connections)
    except BaseException:
        for one in begun:
            _end(one)
        raise


def _end(client: Any) -> None:
    """End the connections of a client that was not made, and their thread."""
    sockets = _sockets(client)
    client._net.stop(timeout_ms=1000)
    with contextlib.suppress(KafkaError, OSError):
        client.close()
    _close_all(sockets)


def _security(address: KafkaAddress) -> dict[str, Any]:
    options, settings = address.options, dict[str, Any]()
    is_tls = options.security == "ssl"
    if address.user is not None:
        password = os.environ.get(options.password_env)
        if password is None:
            raise ValueError(
                f"{address.location} has a user, but "
                f"{shown_option('password_env', options.password_env)} is not set: put "
                f"the password into that environment variable"
            )
        settings |= {
            "sasl_mechanism": options.mechanism.upper(),
            "sasl_plain_username": address.user,
            "sasl_plain_password": password,
        }
    kind = ("SASL_" if address.user is not None else "") + ("SSL" if is_tls else "PLAINTEXT")
    files = {"ssl_cafile": options.ca, "ssl_certfile": options.cert, "ssl_keyfile": options.key}
    given = {name: path for name, path in files.items() if path is not None}
    return settings | {"security_protocol": kind} | (given if is_tls else {})


def _create(
    admin: KafkaAdminClient,
    topic: str,
    num_partitions: int,
    replication: int | None,
    configs: dict[str, str],
) -> None:
    wanted: dict[str, Any] = {"num_partitions": num_partitions, "configs": configs}
    if replication is not None:
        wanted["replication_factor"] = replication
    elif admin._manager.broker_version < (2, 4):
        wanted["replication_factor"] = 1
    try:
        admin.create_topics({topic: wanted}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        return
    except TopicAuthorizationFailedError:
        # Whoever runs the cluster makes the topics; then it is enough that it is there.
        if not admin.describe_topics([topic])[0]["partitions"]:
            raise


@contextlib.contextmanager
def kafka_errors(what: str) -> Iterator[None]:
    """Turn errors of the client into one: ``what`` and a short reason.

    Raises:
        ServiceAwayError: always for errors of the client.
    """
    try:
        yield
    except KafkaError as error:
        number = errno.ETIMEDOUT if isinstance(error, RetriableError) else errno.EIO
        raise ServiceAwayError(number, f"{what}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Kind and beginning of an error: the client appends whole requests to some."""
    kind = type(error).__name__
    if isinstance(error, KafkaTimeoutError):
        return f"the brokers did not answer in time ({error})"
    text = str(error).partition(": Request ")[0]
    return f"{kind} {text[:_MAX_ERROR_LETTERS]}"


def _close_aside(close: Callable[[Any], None], client: Any) -> None:
    """Close a client whose owner is gone. The garbage collector may have noticed that on the
    client's own thread, which cannot wait for its own end."""
    threading.Thread(target=close, args=(client,), name="kafka-close", daemon=True).start()


def close_consumer(consumer: KafkaConsumer) -> None:
    """Close a consumer, and leave its group."""
    sockets = _sockets(consumer._client)
    with contextlib.suppress(KafkaError):
        consumer.close(autocommit=False, timeout_ms=1000)
    _close_all(sockets)


def close_now(producer: KafkaProducer) -> None:
    """Close a producer and discard what it has not sent."""
    sockets = _sockets(producer._sender._client)
    try:
        producer.close(timeout=0)
    except KafkaError:  # there are records left, and the client stops half-way
        producer._closed = True
    producer._sender.force_close()
    producer._sender.join(1.0)
    _close_all(sockets)


def _sockets(client: Any) -> list[socket.socket]:
    """Those of a client, which forgets them when it is closed while data is on its way."""
    transports = [one.transport for one in list(client._manager._conns.values())]
    found = [one._sock for one in transports if one is not None]
    return [one for one in found if one is not None]  # on its thread a transport may just be closed


def _close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()
