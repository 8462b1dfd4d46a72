"""Load settings from files, the environment and the command line into one frozen ``Settings``.

Defaults < ``--config`` files in order < environment ``SLIPSTREAM_A__B`` < ``--set a.b=c``. Each
source becomes one layer, a nested mapping. pydantic validates every layer over the defaults, so an
error can name the source that holds it; then the layers are merged.

Why not pydantic-settings (2.16.3): its environment source ignores unknown names outside a section
(``SLIPSTREAM_MAX_BATCH``), takes ``4.0`` for an int and reads lists as JSON. Its YAML source skips
a missing file, lets the second of two equal keys win and reads ``3e-4`` as text. Its errors do not
name the source. With both sources replaced, only the merge would be left to it, ten lines here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.bundled import resolve_paths, settings_file, shipped_settings
from configs.checks import ENV_PREFIX, check_settings
from configs.choices import SettingsError
from configs.schema import Settings
from configs.urls import MASK, has_secret, shown_place, shown_url, shown_value

SECRETS = frozenset({"server.api_key", "buffer.url"})
"""Settings that errors never quote."""
_NEVER_EMPTY = frozenset({"target", "device", "server.host"})
"""Texts that must say something, as every path must: an empty one is mostly a shell's variable that
is not set, and would stand for the current folder or for every address."""
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,200}")


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings from one source."""

    source: str
    """File name, environment variable or ``--set``."""
    values: dict[str, Any]
    """Nested by section."""


def load_settings(
    files: Sequence[Path], overrides: Sequence[str], env: Mapping[str, str]
) -> Settings:
    """Merge all layers, validate them and resolve bundled paths.

    Args:
        files: YAML files or names of shipped ones, such as ``demo``; later files win. An empty file
            is allowed.
        overrides: ``a.b=c`` texts of ``--set``; later ones win.
        env: environment; only names that begin with ``SLIPSTREAM_`` are read.

    Raises:
        SettingsError: with one line for each problem.
    """
    layers = [*map(_from_file, files), *_from_env(env), *map(_from_override, overrides)]
    problems = [line for layer in layers for line in _problems(layer)]
    if problems:
        raise SettingsError("\n".join(problems))
    settings = _validated(reduce(_merged, (layer.values for layer in layers), _DEFAULTS))
    problems = check_settings(settings)
    if problems:
        raise SettingsError("\n".join(problems))
    return resolve_paths(settings)


def to_yaml(settings: Settings) -> str:
    """All settings in force, as YAML that ``load_settings`` reads back; secrets are masked."""
    tree = settings.model_dump(mode="json")
    if tree["server"]["api_key"] is not None:
        tree["server"]["api_key"] = MASK
    tree["buffer"]["url"] = shown_url(tree["buffer"]["url"])
    text: str = yaml.safe_dump(shown_value(tree), sort_keys=False, default_flow_style=False)
    return text


def has_password(override: str) -> bool:
    """Whether a ``key=value`` text of a secret setting holds a secret: a URL only does if there is
    a password in it."""
    key, _, value = override.partition("=")
    return value not in ("", "null") and (key != "buffer.url" or has_secret(value))


def shown_override(override: str) -> str:
    """A ``key=value`` text as it may be shown."""
    key, equals, value = override.partition("=")
    if not equals:
        return shown_place(override)
    if key in SECRETS:
        return f"{key}={shown_url(value) if key == 'buffer.url' else MASK}"
    return f"{_shown_key(key)}={shown_place(value) if '://' in value else value}"


def keys_named(name: str) -> list[str]:
    """Dotted keys of the settings called ``name``, with or without their section."""
    return [
        key
        for key, annotation in _KEYS.items()
        if (key == name or key.rpartition(".")[2] == name) and not _is_section(annotation)
    ]


# --- layers ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML where a repeated key is an error, ``3e-4`` a number and ``2026-01-01`` a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or mapping as a key is refused below
            if key_node.value in seen:
                problem = f"key {_shown_key(key_node.value)!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
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
        tree = yaml.load(text, Loader=_Loader)
        problem = _why_endless(source, tree)
        if problem is None:
            return tree
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = f"{source}{line}: {error.problem}"
    except yaml.YAMLError as error:
        problem = f"{source}: not YAML: {error}"
    except RecursionError:
        problem = f"{source}: nested too deep"
    except ValueError:  # such as !!int x
        problem = f"{source}: a value is not of the type that its tag says"
    raise SettingsError(problem)  # out here: the error of YAML quotes the line, secrets and all


def _why_endless(source: str, tree: Any) -> str | None:
    """An alias may stand within its own anchor."""
    try:
        json.dumps(tree, default=str, skipkeys=True)
    except ValueError:
        return f"{source}: a value contains itself"
    return None


def _from_file(name: Path) -> _Layer:
    text = None
    try:
        text = settings_file(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        is_bare = not name.suffix and len(name.parts) == 1
        shipped = f"; shipped settings: {', '.join(shipped_settings())}" if is_bare else ""
        problem = f"{shown_place(str(name))}: no such file{shipped}"
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        problem = f"{shown_place(str(name))}: cannot be read: {said}"
    if text is None:  # out here: the error of the system quotes the name, which may be a URL
        raise SettingsError(problem)
    tree = _parse_yaml(text, str(name))
    if tree is not None and not isinstance(tree, dict):
        raise SettingsError(f"{name}: must be key: value lines, got {type(tree).__name__}")
    return _Layer(str(name), _nested(tree or {}))


def _from_env(env: Mapping[str, str]) -> Iterator[_Layer]:
    """One layer per variable, sorted by name, so that a section comes before keys in it."""
    for name in sorted(name for name in env if name.startswith(ENV_PREFIX)):
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        yield _from_text(name, key, env[name])


def _from_override(text: str) -> _Layer:
    key, equals, value = text.partition("=")
    if not equals:
        shown = shown_place(text)
        raise SettingsError(f"--set {shown!r}: expected KEY=VALUE, e.g. --set engine.max_batch=4")
    return _from_text("--set", key.strip(), value)


def _from_text(source: str, key: str, text: str) -> _Layer:
    """Text settings keep their text (an API key of digits is not an int); all others are YAML."""
    accepted = _members(_KEYS.get(key))
    value: Any = text
    if _is_unknown(key):
        pass  # and so is what its value means: ``log:`` would be a mapping in YAML
    elif not {str, Path} & set(accepted):
        value = _parse_yaml(text, source)
    elif NoneType in accepted and text.strip() in ("", "~", "null"):
        value = None
    return _Layer(source, _nested({key: value}))


def _is_unknown(key: str) -> bool:
    """Whether there is no such setting, and none that takes a mapping with such a key."""
    while key and key not in _KEYS:
        key = key.rpartition(".")[0]
        if key in _KEYS:
            return _is_section(_KEYS[key])
    return not key


def _nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Split dotted keys, so that ``engine.max_batch: 4`` equals ``engine: {max_batch: 4}``."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        branch = _nested(value) if isinstance(value, dict) else value
        for part in reversed(str(name).split(".")):
            branch = {part: branch}
        tree = _merged(tree, branch)
    return tree


def _merged(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated section by section with ``values``; an empty section changes nothing."""
    tree = dict(base)
    for name, value in values.items():
        section = base.get(name)
        if isinstance(section, dict) and (value is None or isinstance(value, dict)):
            tree[name] = _merged(section, value or {})
        else:
            tree[name] = value
    return tree


# --- validation ------------------------------------------------------------------------------


def _validated(tree: dict[str, Any]) -> Settings:
    """Validate as JSON, the strict mode that still takes lists for tuples and text for paths."""
    return Settings.model_validate_json(json.dumps(tree, default=str), strict=True)


def _problems(layer: _Layer) -> list[str]:
    """Errors in one layer, one line each; every setting has a default, so a layer stands alone."""
    empty = list(_empty(layer.source, layer.values))
    if empty:
        return empty
    tree = _merged(_DEFAULTS, layer.values)
    try:
        _validated(tree)
    except ValidationError as error:
        problems = error.errors()
        # A value of one of several types has a problem with each: a limit says more than a type.
        limited = {_key_of(problem) for problem in problems if not _is_of_type(problem)}
        said = (p for p in problems if not _is_of_type(p) or _key_of(p) not in limited)
        lines = [line for problem in said for line in _lines(layer.source, problem, tree)]
        return list(dict.fromkeys(lines))
    return []


def _is_of_type(problem: Any) -> bool:
    """The value is of another type, or none of some words."""
    return str(problem["type"]).endswith(("_type", "_parsing", "literal_error"))


def _key_of(problem: Any) -> str:
    """The setting that a problem is about; the location may point into a list or at a type."""
    parts = [str(part) for part in problem["loc"]]
    while parts and ".".join(parts) not in _KEYS:
        parts.pop()
    return ".".join(parts)


def _empty(source: str, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _empty(source, value, f"{key}.")
        elif isinstance(value, str) and not value.strip():
            annotation = _KEYS.get(key)
            if key in _NEVER_EMPTY or Path in _members(annotation):
                must = _type_text(annotation)
                yield f"{source}: {key!r} must be {must}, got nothing; leave it out for the default"


def _lines(source: str, problem: Any, tree: dict[str, Any]) -> Iterator[str]:
    """One pydantic error in our words; each unknown key within an unknown section is named."""
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        for key in _leaves(".".join(parts), problem["input"]):
            yield f"{source}: unknown key {_shown_key(key)!r}; {_hint(key)}"
        return
    key = _key_of(problem)
    value = reduce(lambda node, part: node[part], key.split("."), tree)
    if problem["type"] == "finite_number":
        yield f"{source}: {key!r} must be finite, got {value}"
        return
    said: str = problem["msg"].replace("Input should be", "must be")
    must = f"must be {_type_text(_KEYS[key])}" if _is_of_type(problem) else said
    yield f"{source}: {key!r} {must}, got {_value_text(key, value)}"


def _value_text(key: str, value: Any) -> str:
    """Type and value, cut at 60 characters; a secret's type alone."""
    kind = type(value).__name__
    shown = repr(shown_place(value) if isinstance(value, str) else value)
    is_section_with_some = any(secret.startswith(f"{key}.") for secret in SECRETS)
    if key in SECRETS or is_section_with_some:
        return kind
    if not isinstance(value, str) and re.search(r"://|[@?#]", shown):  # a URL may be among them
        return f"{kind} ({MASK})"
    return f"{kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def _shown_key(key: object) -> str:
    """A key as somebody wrote it; a URL may stand in its place."""
    return str(key) if _KEY.fullmatch(str(key)) else MASK


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def _hint(key: str) -> str:
    """The key probably meant: one with the same last word, else the closest spelling."""
    last = key.rpartition(".")[2]
    same_word = [known for known in _KEYS if known.rpartition(".")[2] == last]
    cutoff = 0.0 if same_word else 0.6
    close = difflib.get_close_matches(key, same_word or list(_KEYS), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else "--print-config lists the known ones"


# --- the schema as dotted keys ---------------------------------------------------------------


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every key; the annotation of a section is its model."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info.annotation
        if _is_section(info.annotation):
            yield from _fields(info.annotation, f"{key}.")  # type: ignore[arg-type]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the single type."""
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def _type_text(annotation: Any) -> str:
    """Name of a type in a message, e.g. ``int or None``."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_text(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"a list of {_type_text(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "a mapping of {} to {}".format(*map(_type_text, get_args(annotation)))
    parts = _members(annotation)
    if len(parts) > 1:
        return " or ".join(_type_text(part) for part in parts)
    if issubclass(annotation, BaseModel):
        return "a section (key: value lines)"
    names: dict[type, str] = {NoneType: "None", Path: "a path"}
    name: str = names.get(annotation, annotation.__name__)
    return name


_KEYS: dict[str, Any] = dict(_fields(Settings))
_DEFAULTS: dict[str, Any] = Settings().model_dump(mode="json")
