"""``buffer.url`` of a Redis or Valkey server.

    redis://[user[:password]@]host[:port][/db][?option=value&...]
    rediss://...   the same over TLS

All keys of a run begin with ``slipstream:{<run>}:``. The braces are a hash tag: in a cluster all of
them are on one node, and what must happen together can.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from configs.urls import shown_option, shown_option_name

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """What a URL says."""

    host: str
    port: int
    db: int
    user: str | None = field(repr=False)
    password: str | None = field(repr=False)
    tls: bool
    run: str
    """Names the keys: server and trainer must use the same."""
    cluster: bool = False
    """The server belongs to a cluster."""
    timeout_s: float = 5.0
    """Longest time to wait for a connection, or for the next part of an answer."""
    spool_bytes: int = 256 << 20
    """Records that may wait in the writer's memory while the server is away."""
    member_timeout_s: float = 60.0
    """Time after which a member of a group that gives no sign of life is taken for dead."""
    piece_bytes: int = 64 << 20
    """Longest value; a larger record is stored as several. Redis itself allows 512 MiB, unless
    ``proto-max-bulk-len`` says otherwise."""
    ca_file: Path | None = None
    """Certificates that the server's must be signed by; ``None``: those of the system."""
    cert_file: Path | None = None
    """Our own certificate, where the server asks for one."""
    key_file: Path | None = None

    @property
    def location(self) -> str:
        """Where the data is, for messages; without user and password."""
        scheme = "rediss" if self.tls else "redis"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{self.db} (run {self.run})"

    def key(self, *parts: str) -> str:
        """Name of a key of this run."""
        return ":".join((f"slipstream:{{{self.run}}}", *parts))


def _text(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"it must match {_NAME.pattern}")
    return text


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("it must be true or false")
    return text == "true"


def _positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not re.fullmatch(r"[-+]?[0-9.]{1,20}|inf|nan", text):
            raise ValueError("it must be a number")
        try:
            value = convert(text)
        except ValueError:
            raise ValueError("it must be a number, and a whole one where it counts") from None
        if not 0 < value < float("inf"):
            raise ValueError("it must be above 0")
        return value

    return read


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"the environment has no {shown_option('password_env', name)}")
    return os.environ[name]


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "run": _text,
    "cluster": _truth,
    "timeout_s": _positive(float),
    "spool_bytes": _positive(int),
    "member_timeout_s": _positive(float),
    "piece_bytes": _positive(int),
    "ca_file": _file,
    "cert_file": _file,
    "key_file": _file,
    "password_env": _from_environment,
}
_OF_TLS = ("ca_file", "cert_file", "key_file")


def parse_redis_url(url: str, run_dir: Path) -> RedisOptions:
    """Read a URL.

    Args:
        url: value of ``buffer.url``.
        run_dir: its name is that of the run, unless the option ``run`` gives another.

    Raises:
        ValueError: names the part that is wrong, and never the password.
    """
    place, _, query = url.partition("?")
    _, mark, rest = place.partition("://")
    _, _, path = rest.partition("/")
    if not re.fullmatch("[!-~]*", url):
        raise _refused("it has a letter that a URL writes with %, such as a space as %20")
    if "#" in url:
        raise _refused("it has a '#', which a password must write as %23")
    if "@" in path or "@" in query:
        raise _refused(
            "it has an '@' behind its host; a password must write '/' as %2F, '?' as %3F and '@' "
            "as %40"
        )
    parts, host, port = _split(url)
    if not mark or not parts.netloc or not host:
        raise _refused("it must name a host, as in redis://127.0.0.1:6379/0")
    if not _HOST.fullmatch(host):
        raise _refused("its host is no name or address")
    tls = parts.scheme == "rediss"
    options = _options(parts.query, tls)
    password = options.pop("password_env", None)
    if parts.password is not None:
        if password is not None:
            raise _refused("it has both a password and password_env")
        password = unquote(parts.password)
    db = _db_of(parts.path)
    if db and options.get("cluster"):
        raise _refused("a cluster has database 0 only")
    return RedisOptions(
        host=host,
        port=6379 if port is None else port,
        db=db,
        user=unquote(parts.username) if parts.username else None,
        password=password,
        tls=tls,
        **{"run": _run_of(run_dir), **options} if "run" not in options else options,
    )


def _split(url: str) -> tuple[SplitResult, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts, parts.hostname, parts.port
    except ValueError:
        pass
    raise _refused("host and port cannot be read")  # out here: what it replaces quotes them


def _refused(problem: str) -> ValueError:
    return ValueError(f"buffer.url cannot be used: {problem}")


def _options(query: str, tls: bool) -> dict[str, Any]:
    if any(not part.partition("=")[1] for part in query.split("&") if query):
        raise _refused("its options must be name=value, joined with &")
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            shown = shown_option_name(name)
            raise _refused(f"unknown option {shown!r}; known are {', '.join(_OPTIONS)}")
        if name in options:
            raise _refused(f"option {name!r} is given twice")
        if name in _OF_TLS and not tls:
            raise _refused(f"option {name!r} needs rediss://")
        options[name], problem = _value(name, text)
        if problem is not None:
            raise _refused(f"option {name}={shown_option(name, text)!r}: {problem}")
    return options


def _value(name: str, text: str) -> tuple[Any, str | None]:
    """The value of an option, or why it has none."""
    try:
        return _OPTIONS[name](text), None
    except ValueError as error:
        return None, str(error)


def _db_of(path: str) -> int:
    text = path.removeprefix("/") or "0"
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise _refused("the number of the database must follow the host, and nothing else")
    return int(text)


def _run_of(run_dir: Path) -> str:
    name = run_dir.resolve().name
    if not _NAME.fullmatch(name):
        raise _refused(
            f"run_dir is called {name!r}, which names no keys; name the run with ?run=NAME"
        )
    return name


def connection_arguments(options: RedisOptions) -> Mapping[str, Any]:
    """Arguments of ``redis.Redis`` and ``redis.RedisCluster`` alike."""
    arguments: dict[str, Any] = {
        "host": options.host,
        "port": options.port,
        "username": options.user,
        "password": options.password,
        "socket_timeout": options.timeout_s,
        "socket_connect_timeout": options.timeout_s,
        "socket_keepalive": True,
        "ssl": options.tls,
    }
    if options.tls:
        names = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
        arguments |= {
            theirs: str(path)
            for ours, theirs in names.items()
            if (path := getattr(options, ours)) is not None
        }
        arguments |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    return arguments
