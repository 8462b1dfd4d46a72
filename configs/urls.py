"""How URLs are shown: without user, password, keys and tokens, whatever they look like.

Only what is known to be harmless is shown: a scheme, hosts and ports, folders, and options of the
buffer with values of their form. Everything else becomes ``MASK``, so a password with a raw ``/``,
``?``, ``#`` or ``@`` in it hides more of its URL, never less.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

MASK = "********"
"""Stands for what is not shown."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,15}")
_BEGUN = re.compile(r"//|\?|[a-z][a-z0-9+.-]*://")
"""Follows a scheme; otherwise what stands before a colon may be the user of ``user:password@host``.
"""
_PRINTABLE = re.compile(r"[!-~]*")
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")
_ADDRESS = re.compile(r"\[?[0-9A-Fa-f]{0,4}(:[0-9A-Fa-f]{0,4}){1,7}\]?")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~+,=%-]*)*")
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(/|.*@)")
_LONGEST = 2048
_DEEPEST = 4
"""URLs within each other."""
_LONG = 6
_SHORTEST = 3
"""Letters of a piece that is taken out of a text; shorter ones are in any text."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,9})?")
_WORD = re.compile(r"[a-z0-9-]{1,16}")
_FILE = re.compile(r"\.{0,2}/[A-Za-z0-9._/+-]{0,1000}")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]{0,15}(_[A-Z0-9]{1,16}){1,6}")
_OPTIONS: dict[str, re.Pattern[str]] = {
    "run": _NAME,
    "cluster": _WORD,
    "timeout_s": _NUMBER,
    "session_s": _NUMBER,
    "member_timeout_s": _NUMBER,
    "spool_bytes": _NUMBER,
    "piece_bytes": _NUMBER,
    "message_bytes": _NUMBER,
    "batch_bytes": _NUMBER,
    "in_flight_bytes": _NUMBER,
    "partitions": _NUMBER,
    "replication": _NUMBER,
    "compression": _WORD,
    "security": _WORD,
    "mechanism": _WORD,
    "ca": _FILE,
    "cert": _FILE,
    "key": _FILE,
    "ca_file": _FILE,
    "cert_file": _FILE,
    "key_file": _FILE,
    "key_env": _VARIABLE,
    "password_env": _VARIABLE,
}
"""Options of ``buffer.url`` that may be shown, and the form of a value that may. A key itself,
given where its file or variable belongs, has none of these forms."""
_NESTED = "traces"
"""The option whose value is the rest, a URL of its own."""


def shown_url(url: str) -> str:
    """A URL without what may be a secret. One that holds none and is written plainly is shown as it
    is."""
    return _shown(url, _DEEPEST)


def has_secret(url: str) -> bool:
    """Whether a URL holds more than may be read by everybody; a user without a password is no
    secret here."""
    without_user = re.sub(r"(?<=://)[A-Za-z0-9._-]{1,64}@(?=[^@]*\Z)", "", url, count=1)
    return shown_url(without_user) != without_user


def shown_place(text: str) -> str:
    """A word of the command line: a path as it is, and a URL as ``shown_url`` shows it."""
    is_plain = len(text) <= _LONGEST and not re.search(r"[:@?#]", text)
    return text if is_plain or _ADDRESS.fullmatch(text) else shown_url(text)


def is_url_as_path(path: PurePath | str) -> bool:
    """Whether a path is a URL that somebody wrote where a file or folder belongs; ``Path`` has
    made one slash of two."""
    return _URL_AS_PATH.match(str(path)) is not None


def file_place_problem(name: str, path: PurePath | str) -> str | None:
    """What is wrong with a path that may be a URL, without its secrets; ``None`` if it is a path.

    Args:
        name: names the setting or option in the message.
    """
    if not is_url_as_path(path):
        return None
    return f"{name} must be a path, not a URL, got {shown_place(str(path))}"


def shown_value(value: Any) -> Any:
    """The value of a setting as it may be printed, lists and sections too: texts in which a URL
    with a secret stands lose that."""
    if isinstance(value, dict):
        return {name: shown_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [shown_value(one) for one in value]
    if isinstance(value, str) and is_url_as_path(value) and has_secret(value):
        return shown_url(value)
    return value


def shown_scheme(url: str) -> str | None:
    """The scheme of a URL; ``None`` if what stands there may be something else."""
    scheme, colon, rest = url.partition(":")
    is_plain = bool(colon) and _SCHEME.fullmatch(scheme) is not None
    is_followed = "@" not in rest or _BEGUN.match(rest) is not None
    return scheme if is_plain and is_followed else None


def shown_option(name: str, value: str) -> str:
    """The value of an option of a URL, if it has the form of one that may be shown."""
    form = _OPTIONS.get(name)
    return value if form is not None and form.fullmatch(value) else MASK


def shown_option_name(name: str) -> str:
    """The name of an option, known or not, unless it may be a piece of a password."""
    return name if re.fullmatch(r"[a-z]{2,16}(_[a-z]{1,16}){0,3}", name) else MASK


def without_secrets(text: str, *urls: str, but: Collection[str] = ()) -> str:
    """A text of somebody else, such as the error of a library, without the URLs' secrets.

    Args:
        but: words that are none although a URL that is hidden as a whole has them: its scheme,
            where that is known.
    """
    for url in urls:
        text = text.replace(url, shown_url(url))
        for piece in _hidden_pieces(url):
            if piece in but:
                continue
            # A short one may be a part of a word of ours, a long one is nobody else's.
            edge = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])" if len(piece) < _LONG else "{}"
            text = re.sub(edge.format(re.escape(piece)), MASK, text)
    return text


def _hidden_pieces(url: str) -> Iterable[str]:
    """What a URL holds and does not show, longest first; also as it is when decoded."""
    shown = set(_pieces(shown_url(url)))
    found = {piece for text in (url, unquote(url)) for piece in _pieces(text)} - shown
    return sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)


def _pieces(url: str) -> list[str]:
    return [*re.split(r"[\s:/?#@&=;,]+", url), *re.split(r"[^A-Za-z0-9]+", url)]


def _shown(url: str, depth: int) -> str:
    scheme = shown_scheme(url)
    if scheme is None or depth == 0 or len(url) > _LONGEST:
        return MASK
    rest = url[len(scheme) + 1 :]
    if not _PRINTABLE.fullmatch(rest):
        return f"{scheme}:{MASK}"
    place, mark, query = rest.partition("?")
    if ":" in place and place[0] not in "/:":
        return f"{scheme}:{_shown(rest, depth - 1)}"
    options = f"?{_shown_query(query, depth)}" if mark else ""
    if not place.startswith("//"):
        return f"{scheme}:{_shown_opaque(place)}{options}"
    own = query.partition(f"{_NESTED}=")[0]  # the URL of an option is looked at by itself
    authority, slash, path = place[2:].partition("/")
    _, at, hosts = authority.rpartition("@")
    # With one of these in it, nobody knows where a password ends.
    is_unclear = "@" in path or "@" in own or "#" in place or "#" in own
    if is_unclear or (hosts and not _HOSTS.fullmatch(hosts)):
        return f"{scheme}://{MASK}"
    if at and not hosts:
        return f"{scheme}://{MASK}"
    folder = slash + path
    shown_folder = folder if _PATH.fullmatch(folder) else f"/{MASK}"
    return f"{scheme}://{MASK + at if at else ''}{hosts}{shown_folder}{options}"


def _shown_opaque(place: str) -> str:
    """What follows a scheme without ``//``: a folder, a plain name, or nothing."""
    form = _PATH if place.startswith("/") else _NAME
    return place if not place or form.fullmatch(place) else MASK


def _shown_query(query: str, depth: int) -> str:
    before, separator, nested = query.partition(f"{_NESTED}=")
    if separator and (not before or before.endswith("&")):
        shown = _shown_pairs(before)
        return f"{shown}{separator}{_shown(nested, depth - 1)}" if shown == before else shown
    return _shown_pairs(query)


def _shown_pairs(query: str) -> str:
    """Options up to the first that may be a secret: what follows may be a part of it, which has a
    raw ``&``."""
    shown: list[str] = []
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        if pair and (not equals or shown_option_name(name) == MASK):
            return "&".join([*shown, MASK])
        shown.append(f"{name}{equals}{shown_option(name, value) if equals else ''}")
        if shown[-1] != pair:
            return "&".join(shown)
    return "&".join(shown)
