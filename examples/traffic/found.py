"""Functions and prose of this Python installation, found without importing or parsing anything.

Regular expressions read the sources of the standard library and of installed packages a hundred
times as fast as a parser, and what they miss does not matter. Files come in an order that a seed
fixes, so that the same installation gives the same text.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from examples import corpus

_FUNCTION = re.compile(
    r"^(?P<indent>[ ]*)"
    r"(?P<head>(?:async )?def (?P<name>\w+)"
    r"\([^()]*(?:\([^()]*\)[^()]*)*\)(?:[ ]*->[^:\n]+)?:)[ ]*\n"
    r'(?P=indent)[ ]+r?"""(?P<doc>[^"\\]{20,2000}?)"""[ ]*\n'
    r"(?P<body>(?:(?:(?P=indent)[ ]+\S[^\n]*)?\n)*)",
    re.MULTILINE,
)
_DOCSTRING = re.compile(r'^[ ]*r?"""([^"\\]{300,6000}?)"""[ ]*$', re.MULTILINE)
MIN_PASSAGE, MAX_PASSAGE = 400, 1500
"""Characters of a passage."""


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function of some file."""

    name: str
    head: str
    """From ``def`` to the colon, with the indentation of its file taken away."""
    doc: str
    body: str
    """What follows the docstring, indented by four spaces."""


def functions(seed: int) -> Iterator[Function]:
    """Documented functions, in the order of the seed; the same one may come twice."""
    for text in _sources("python", seed):
        for match in _FUNCTION.finditer(text):
            yield _function_of(match)


def passages(seed: int) -> Iterator[str]:
    """Passages of prose about programs: whole paragraphs, ``MIN_PASSAGE`` to ``MAX_PASSAGE``
    characters together, from docstrings and from documentation."""
    docs = list(corpus.sources("docs"))
    pages = [one for one in docs if one.topic is not None or one.path.suffix != ".py"]
    random.Random(seed).shuffle(pages)
    read = (document.text for document in map(corpus.read, pages) if document is not None)
    docstrings = (
        inspect.cleandoc(found) for text in _sources("python", seed) for found in _docstrings(text)
    )
    for text in _in_turn(read, docstrings):
        yield from _passages(text)


def _docstrings(text: str) -> list[str]:
    return [] if '"""' not in text else _DOCSTRING.findall(text)


def _in_turn(first: Iterator[str], second: Iterator[str]) -> Iterator[str]:
    """One of each in turn, then the rest of the longer one."""
    for text in first:
        yield text
        if (other := next(second, None)) is not None:
            yield other
    yield from second


def _sources(domain: corpus.Domain, seed: int) -> Iterator[str]:
    chosen = list(corpus.sources(domain))
    random.Random(seed).shuffle(chosen)
    for source in chosen:
        text = corpus.content_of(source.path)
        if text is not None and text.isascii():
            yield text


def _function_of(match: re.Match[str]) -> Function:
    indent = len(match["indent"])
    body = inspect.cleandoc("\n" + match["body"])
    indented = "\n".join(f"    {line}" if line else "" for line in body.splitlines())
    head = "\n".join(line[indent:] for line in f"{match['indent']}{match['head']}".splitlines())
    return Function(match["name"], head, inspect.cleandoc(match["doc"]), indented)


def _passages(text: str) -> Iterator[str]:
    """Neighbouring paragraphs of prose, joined until they are long enough."""
    joined = ""
    for paragraph in corpus.paragraphs(text):
        if not corpus.reads_like_prose(paragraph) or len(joined) + len(paragraph) > MAX_PASSAGE:
            joined = ""
            continue
        joined = f"{joined}\n\n{paragraph}" if joined else paragraph
        if len(joined) >= MIN_PASSAGE:
            yield joined
            joined = ""
