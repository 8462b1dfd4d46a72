"""From files, environment and command line to one frozen ``Settings``.

Defaults < files in order < environment ``SLIPSTREAM_A__B`` < ``--set a.b=c``. Every layer is first
flattened to dotted keys, so that merging is one ``dict.update`` and every complaint can name the
place where its value was written.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.schema import Settings

ENV_PREFIX = "SLIPSTREAM_"
MASK = "********"
"""What ``to_yaml`` writes in place of a secret."""

_SECRETS = frozenset({"server.api_key"})
_ROOT = Path(__file__).resolve().parent.parent


class SettingsError(ValueError):
    """Some settings are unknown, of a wrong type or contradictory; one line of text for each."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value that somebody wrote."""

    source: str
    """File name, environment variable or ``--set``."""
    key: str
    """Dotted."""
    value: Any


def load_settings(
    files: Sequence[Path], overrides: Sequence[str], env: Mapping[str, str]
) -> Settings:
    """Merge all layers, validate them and resolve bundled paths.

    Args:
        files: YAML files; a later one wins. An empty file is allowed.
        overrides: ``a.b=c`` texts of ``--set``; a later one wins.
        env: environment; only names that begin with ``SLIPSTREAM_`` are read.

    Raises:
        SettingsError: with one line for each problem.
    """
    entries = [entry for file in files for entry in _from_file(file)]
    entries += _from_env(env)
    entries += [entry for text in overrides for entry in _from_override(text)]

    unknown = [_unknown_text(entry) for entry in entries if not _is_known(entry)]
    if unknown:
        raise SettingsError("\n".join(unknown))

    settings = _validate({entry.key: entry for entry in entries if entry.key not in _SECTIONS})
    problems = check_settings(settings)
    if problems:
        raise SettingsError("\n".join(problems))
    return _resolve_paths(settings)


def check_settings(settings: Settings) -> list[str]:
    """What is wrong between keys that are each fine alone; empty when nothing is."""
    server, engine, drafter = settings.server, settings.engine, settings.drafter
    policy, suffix, buffer = settings.policy, settings.drafter.suffix, settings.buffer
    fixed_on_drafter = policy.kind == "fixed" and policy.draft_k > 0 and drafter.kind != "none"
    suffix_offered = drafter.kind != "none" and suffix.enabled
    checks = (
        (
            not _is_loopback(server.host) and not server.api_key,
            f"server.host {server.host!r} is not loopback and server.api_key is not set; "
            f"set {ENV_PREFIX}SERVER__API_KEY or bind 127.0.0.1",
        ),
        (
            server.api_key == MASK,
            "server.api_key is the mask that --print-config prints; put the real key there",
        ),
        (
            policy.kind == "fixed" and policy.draft_k > drafter.max_draft,
            f"policy.draft_k {policy.draft_k} is above drafter.max_draft {drafter.max_draft}; "
            f"lower the one or raise the other",
        ),
        (
            fixed_on_drafter and policy.drafter == "eagle3" and drafter.kind == "suffix",
            "policy.drafter 'eagle3' is not loaded with drafter.kind 'suffix'; "
            "set policy.drafter to 'suffix' or drafter.kind to 'eagle3'",
        ),
        (
            fixed_on_drafter and policy.drafter == "suffix" and not suffix_offered,
            "policy.drafter 'suffix' needs drafter.suffix.enabled",
        ),
        (
            drafter.kind == "suffix" and not suffix.enabled,
            "drafter.kind 'suffix' needs drafter.suffix.enabled; use drafter.kind 'none' to decode "
            "without a drafter",
        ),
        (
            suffix.min_match > suffix.max_match,
            f"drafter.suffix.min_match {suffix.min_match} is above drafter.suffix.max_match "
            f"{suffix.max_match}",
        ),
        (
            engine.num_pages is not None
            and engine.num_pages * engine.page_size < engine.max_model_len,
            f"engine.num_pages {engine.num_pages} of engine.page_size {engine.page_size} tokens "
            f"cannot hold one request of engine.max_model_len {engine.max_model_len}",
        ),
        (
            buffer.segment_bytes > buffer.max_bytes,
            f"buffer.segment_bytes {buffer.segment_bytes} is above buffer.max_bytes "
            f"{buffer.max_bytes}",
        ),
    )
    return [text for is_wrong, text in checks if is_wrong]


def to_yaml(settings: Settings) -> str:
    """All settings in force, as YAML that ``load_settings`` reads back; secrets are masked."""
    tree = settings.model_dump(mode="json")
    if tree["server"]["api_key"] is not None:
        tree["server"]["api_key"] = MASK
    text: str = yaml.safe_dump(tree, sort_keys=False, default_flow_style=False)
    return text


# --- the schema as dotted keys ---------------------------------------------------------------


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every key; the annotation of a section is its model."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info.annotation
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{key}.")


_KEYS: dict[str, Any] = dict(_fields(Settings))
_SECTIONS = frozenset(
    key for key, kind in _KEYS.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
)


def _accepts(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the one type."""
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def _type_text(annotation: Any) -> str:
    """How a type is called in a message, e.g. ``int or None``."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list of {_type_text(get_args(annotation)[0])}"
    parts = _accepts(annotation)
    if len(parts) > 1:
        return " or ".join(_type_text(part) for part in parts)
    if issubclass(annotation, BaseModel):
        return "a section (key: value lines)"
    names: dict[type, str] = {NoneType: "None", Path: "a path"}
    name: str = names.get(annotation, annotation.__name__)
    return name


def _is_known(entry: _Entry) -> bool:
    return entry.key in _KEYS


def _unknown_text(entry: _Entry) -> str:
    text = f"{entry.source}: unknown key {entry.key!r}"
    nearest = _nearest_key(entry.key)
    if nearest is not None:
        return f"{text}; did you mean {nearest!r}?"
    return f"{text}; --print-config lists the known ones"


def _nearest_key(key: str) -> str | None:
    """The known key that was probably meant: same last word elsewhere, else closest spelling."""
    last = key.rpartition(".")[2]
    same_word = [known for known in _KEYS if known.rpartition(".")[2] == last]
    candidates = same_word if same_word else list(_KEYS)
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0 if same_word else 0.6)
    return close[0] if close else None


# --- layers ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose repeated keys are an error, whose ``3e-4`` is a number and ``2026-01-01`` text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # refused below: a list or mapping is no key
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{source}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not YAML: {error}") from error


def _from_file(file: Path) -> list[_Entry]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SettingsError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from error
    tree = _parse_yaml(text, str(file))
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise SettingsError(f"{file}: must be key: value lines, got {type(tree).__name__}")
    return list(_flatten(str(file), tree))


def _from_env(env: Mapping[str, str]) -> list[_Entry]:
    """Sorted by name, so that a section and a key of it always merge in one order."""
    names = sorted(name for name in env if name.startswith(ENV_PREFIX))
    return [
        entry
        for name in names
        for entry in _from_text(
            name, name.removeprefix(ENV_PREFIX).lower().replace("__", "."), env[name]
        )
    ]


def _from_override(text: str) -> Iterator[_Entry]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text!r}: expected KEY=VALUE, e.g. --set engine.max_batch=4")
    return _from_text("--set", key.strip(), value)


def _from_text(source: str, key: str, text: str) -> Iterator[_Entry]:
    """Text keys take the text as it is (a key of digits is no int); all others are YAML."""
    accepted = _accepts(_KEYS.get(key))
    if {str, Path} & set(accepted):
        is_none = NoneType in accepted and text.strip() in ("", "~", "null")
        return iter([_Entry(source, key, None if is_none else text)])
    return _flatten_value(source, key, _parse_yaml(text, source))


def _flatten(source: str, tree: Mapping[Any, Any], prefix: str = "") -> Iterator[_Entry]:
    for name, value in tree.items():
        yield from _flatten_value(source, f"{prefix}{name}", value)


def _flatten_value(source: str, key: str, value: Any) -> Iterator[_Entry]:
    """Descends into sections, and into unknown mappings so that each key of them is named."""
    is_leaf = key in _KEYS and key not in _SECTIONS
    if isinstance(value, dict) and value and not is_leaf:
        yield from _flatten(source, value, f"{key}.")
    elif key in _SECTIONS and value not in (None, {}):
        raise SettingsError(_wrong_type_text(_Entry(source, key, value)))
    else:
        yield _Entry(source, key, value)


# --- validation ------------------------------------------------------------------------------


def _validate(entries: Mapping[str, _Entry]) -> Settings:
    """JSON is the strict mode that still takes lists for tuples and text for paths."""
    infinite = [
        f"{entry.source}: {entry.key!r} must be finite, got {entry.value}"
        for entry in entries.values()
        if isinstance(entry.value, float) and not math.isfinite(entry.value)
    ]
    if infinite:
        raise SettingsError("\n".join(infinite))
    text = json.dumps(_unflatten(entries), default=str)
    try:
        return Settings.model_validate_json(text, strict=True)
    except ValidationError as error:
        lines = [_problem_text(problem, entries) for problem in error.errors()]
        raise SettingsError("\n".join(dict.fromkeys(lines))) from None


def _unflatten(entries: Mapping[str, _Entry]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry in entries.values():
        *sections, name = entry.key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = entry.value
    return tree


def _problem_text(problem: Any, entries: Mapping[str, _Entry]) -> str:
    """One pydantic error in our words. ``loc`` may point into a list inside a key."""
    parts = [str(part) for part in problem["loc"]]
    key = next(
        dotted
        for dotted in (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        if dotted in entries
    )
    entry = entries[key]
    if problem["type"].endswith(("_type", "_parsing")) or problem["type"] == "literal_error":
        return _wrong_type_text(entry)
    must = problem["msg"].replace("Input should be", "must be")
    return f"{entry.source}: {key!r} {must}{_got_text(entry)}"


def _wrong_type_text(entry: _Entry) -> str:
    return f"{entry.source}: {entry.key!r} must be {_type_text(_KEYS[entry.key])}{_got_text(entry)}"


def _got_text(entry: _Entry) -> str:
    kind = type(entry.value).__name__
    if entry.key in _SECRETS:
        return f", got {kind}"
    shown = repr(entry.value)
    return f", got {kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# --- bundled paths ---------------------------------------------------------------------------


def _resolve_paths(settings: Settings) -> Settings:
    """``examples/target`` means the bundled one also from another working directory."""
    path = settings.drafter.path
    drafter = settings.drafter.model_copy(
        update={"path": None if path is None else Path(_bundled(str(path)))}
    )
    return settings.model_copy(update={"target": _bundled(settings.target), "drafter": drafter})


def _bundled(path: str) -> str:
    """The path itself, unless it only exists under the folder that holds ``configs/``."""
    if Path(path).is_absolute() or Path(path).exists() or not (_ROOT / path).exists():
        return path
    return str(_ROOT / path)
