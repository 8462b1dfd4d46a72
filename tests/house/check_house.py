"""Rules of the house that linters do not know: drafter kinds, attributes per class, lines per file.

    python -m tests.house.check_house

prints every violation and exits with code 1 if there are any. ``make check`` runs it.

- Outside ``drafters/``, ``configs/``, ``tests/`` and ``oracles/`` no drafter kind of the catalog is
  spelled: others ask for traits. Identifiers (``PagedEagle3``, ``suffix_matches``), imports and
  strings count, docstrings and comments too. ``Path.suffix`` is not the drafter, and a word of
  English counts in prose only where it names the drafter ("the suffix index"). Settings written as
  text (``drafter.kind=eagle3``) may name a kind in benchmarks and examples.
- No class in the product rooms has more than 15 attributes: names assigned on ``self`` in any
  method, and dataclass fields. Fields of pydantic models do not count, because they are one
  documented key each.
- No Python file in the product rooms, benchmarks or examples has more than 500 lines, except
  kernels, which stand beside their definitions.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import token
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PRODUCT_ROOMS = (
    "serving",
    "trainer",
    "buffer",
    "reporting",
    "drafters",
    "policies",
    "targets",
    "configs",
    "kernels/specops",
)
AROUND = ("benchmarks", "examples")

MAX_ATTRIBUTES = 15
MAX_LINES = 500

EXCEPTIONS: dict[str, str] = {
    "serving/http/request_bodies.py: spells the drafter kind 'suffix'": (
        "OpenAI's field of that name"
    ),
    "serving/http/fewest_tokens.py: spells the drafter kind 'suffix'": (
        "a property of BPE in the library tokenizers"
    ),
    "benchmarks/by_match.py: spells the drafter kind 'eagle3'": (
        "judges chains of that drafter's training at every position of a trace"
    ),
    "benchmarks/index.py: spells the drafter kind 'suffix'": (
        "compares the search of this drafter with the one that it replaced"
    ),
    "benchmarks/index_peer.py: spells the drafter kind 'suffix'": (
        "compares the search of this drafter with that of another library"
    ),
    **{
        f"benchmarks/recipes.py: spells the drafter kind {kind!r}": (
            "compares what new weights of kinds begin as"
        )
        for kind in ("dflash", "eagle3")
    },
    "benchmarks/peers/__main__.py: spells the drafter kind 'mtp'": (
        "the option of transformers that such heads are generated with there"
    ),
    "benchmarks/harness/predictable.py: spells the drafter kind 'eagle3'": (
        "writes weights into tensors that only this kind has"
    ),
    "benchmarks/harness/random_targets.py: spells the drafter kind 'eagle3'": (
        "publishes bundles of this kind, also for checkouts without a catalog"
    ),
    "benchmarks/harness/side.py: spells the drafter kind 'eagle3'": (
        "builds checkouts without a catalog too"
    ),
    "benchmarks/harness/side.py: spells the drafter kind 'suffix'": (
        "builds checkouts without a catalog too"
    ),
    "benchmarks/ops/eagle_pass.py: spells the drafter kind 'eagle3'": (
        "measures the kernels of one drafter"
    ),
    "benchmarks/ops/drafter.py: spells the drafter kind 'eagle3'": (
        "measures the kernels of one drafter"
    ),
    "benchmarks/peers/__main__.py: spells the drafter kind 'dflash'": (
        "transformers' own, which is measured as a peer"
    ),
    **{
        f"benchmarks/peers/{name}.py: spells the drafter kind {kind!r}": (
            "the authors' own code of these drafters, which is measured as a peer"
        )
        for name in ("authors", "authors_code")
        for kind in ("eagle3", "dflash")
    },
    "benchmarks/peers/authors_code.py: spells the drafter kind 'draft_model'": (
        "part of the name of DFlash's class"
    ),
    "benchmarks/peers/decoders.py: spells the drafter kind 'dflash'": (
        "transformers' own, which is measured as a peer"
    ),
    "benchmarks/real/train_drafter.py: spells the drafter kind 'eagle3'": (
        "trains one, and says so"
    ),
    "examples/train_drafter.py: spells the drafter kind 'eagle3'": (
        "made the drafter that the repository bundles"
    ),
    "serving/requests.py: class EngineFigures has more than 15 attributes": (
        "one counter or gauge per line, as /metrics shows them"
    ),
    "serving/sampling.py: class SamplingParams has more than 15 attributes": (
        "the table of sampling fields: one field of the API per line"
    ),
    "serving/engine/sequence.py: class Sequence has more than 15 attributes": (
        "the running state of one request: the one object that is edited in place"
    ),
}
"""Reason for each violation that stays, by ``Violation.name``."""

_KIND_ROOMS = (*(set(PRODUCT_ROOMS) - {"drafters", "configs"}), *AROUND)
_LINE_ROOMS = (*(set(PRODUCT_ROOMS) - {"kernels/specops"}), *AROUND)
_FSTRING_MIDDLE = getattr(token, "FSTRING_MIDDLE", token.STRING)  # new in Python 3.12
_PATH_API = {"suffix", "suffixes", "with_suffix"}
_SETTING = re.compile(r"\b(drafter|policy)\.[\w.]+(=[\w./-]*)?")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule."""

    path: str
    """Relative to the repository."""
    line: int
    """1 for a whole file."""
    what: str
    """What is wrong, without line numbers, so that an exception stays valid when lines move."""

    @property
    def name(self) -> str:
        """Key in ``EXCEPTIONS``."""
        return f"{self.path}: {self.what}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def spelled_kinds(path: str, source: str, kinds: Iterable[str]) -> Iterator[Violation]:
    """Drafter kinds in identifiers, strings and comments, once per line and kind.

    Args:
        path: relative to the repository; decides whether settings as text may name a kind.
        kinds: names in the catalog of drafters.
    """
    may_set = Path(path).parts[0] in AROUND
    before: list[str] = []
    seen: set[tuple[int, str]] = set()
    for one in tokenize.generate_tokens(io.StringIO(source).readline):
        for kind in kinds:
            for line in _lines_with(kind, one, before, may_set):
                if (line, kind) not in seen:
                    seen.add((line, kind))
                    yield Violation(path, line, f"spells the drafter kind {kind!r}")
        before = [*before[-1:], one.string]


def _lines_with(
    kind: str, one: tokenize.TokenInfo, before: list[str], may_set: bool
) -> Iterator[int]:
    """Lines of a token where ``kind`` is spelled; ``before`` holds the two preceding tokens."""
    first = one.start[0]
    if one.type == token.NAME:
        is_path_api = one.string in _PATH_API and before[-1:] == ["."] and before[0] != "drafter"
        if kind in _parts(one.string) and not is_path_api:
            yield first
    elif one.type in (token.STRING, token.COMMENT, _FSTRING_MIDDLE):
        text = _SETTING.sub("", one.string) if may_set else one.string
        for number, line in enumerate(text.splitlines(), start=first):
            if _prose(kind).search(line):
                yield number


def _prose(kind: str) -> re.Pattern[str]:
    """Pattern of a kind in strings and comments.

    A kind that is not an English word counts anywhere, with or without hyphens. A word counts in
    quotes, in names such as ``suffix_match``, and before "index", "drafter" or "arm".
    """
    if not kind.isalpha():
        spelled = r"[-_ ]?".join(re.escape(part) for part in re.findall(r"[a-z]+|\d+", kind))
        return re.compile(spelled, re.IGNORECASE)
    return re.compile(
        rf"[`'\"]{kind}[`'\"]|\b{kind}(_\w|[ -](index|drafter|arm)\b)|drafter\.{kind}\b",
        re.IGNORECASE,
    )


def _parts(identifier: str) -> list[str]:
    """``PagedEagle3`` and ``paged_eagle3`` are both paged, eagle3."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", identifier)]


def large_classes(path: str, source: str) -> Iterator[Violation]:
    """Classes with more than ``MAX_ATTRIBUTES`` attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            count = len(_attributes(node))
            if count > MAX_ATTRIBUTES:
                what = f"class {node.name} has more than {MAX_ATTRIBUTES} attributes"
                yield Violation(path, node.lineno, what)


def _attributes(node: ast.ClassDef) -> set[str]:
    names = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        names |= {
            inner.target.id
            for inner in node.body
            if isinstance(inner, ast.AnnAssign)
            and isinstance(inner.target, ast.Name)
            and "ClassVar" not in ast.unparse(inner.annotation)
        }
    return names


def long_file(path: str, source: str) -> Iterator[Violation]:
    """A file of more than ``MAX_LINES`` lines."""
    count = len(source.splitlines())
    if count > MAX_LINES:
        yield Violation(path, 1, f"has {count} lines, over {MAX_LINES}")


def violations(kinds: Iterable[str]) -> list[Violation]:
    """All violations in the repository, exceptions included, in the order of paths and lines."""
    names = sorted(kinds)
    found = [
        one for path, text in _sources(_KIND_ROOMS) for one in spelled_kinds(path, text, names)
    ]
    found += [one for path, text in _sources(PRODUCT_ROOMS) for one in large_classes(path, text)]
    found += [one for path, text in _sources(_LINE_ROOMS) for one in long_file(path, text)]
    return sorted(found, key=lambda one: (one.path, one.line, one.what))


def complaints(found: Iterable[Violation], exceptions: dict[str, str]) -> list[str]:
    """Violations that are no exceptions, and exceptions without a violation."""
    found = list(found)
    unused = exceptions.keys() - {one.name for one in found}
    return [str(one) for one in found if one.name not in exceptions] + [
        f"the exception {name!r} matches no violation; delete it from {Path(__file__).name}"
        for name in sorted(unused)
    ]


def _sources(rooms: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path relative to the repository, text) of every Python file in ``rooms``."""
    for room in rooms:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8")


def drafter_kinds() -> set[str]:
    """Kinds of the catalog; ``none`` is plain decoding, and a word that everybody needs."""
    from drafters.catalog import CATALOG

    return set(CATALOG) - {"none"}


if __name__ == "__main__":
    found = complaints(violations(drafter_kinds()), EXCEPTIONS)
    print("\n".join(found) if found else "The house is in order.")
    sys.exit(1 if found else 0)
