"""Encodes a trace as a safetensors blob: arrays as tensors, the rest as JSON in ``__metadata__``.

``__metadata__`` holds ``schema`` ("slipstream.trace"), ``version`` ("1") and ``trace`` (JSON). A
reader accepts every version up to its own and ignores unknown keys; a change that an old reader
could misread gets a new version. Rounds are stored by column. JSON has no infinity, so a
log-probability of -inf is stored as null.
"""

from __future__ import annotations

import json
import math
from itertools import repeat
from operator import attrgetter
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from buffer.records import FeatureRows, Round, Sampling, Trace
from buffer.tensors import (
    TensorFileError,
    TensorHeader,
    bits_are_finite,
    join_tensors,
    parse_header,
    parse_json,
)

SCHEMA = "slipstream.trace"
VERSION = 1
MAX_HEADER_BYTES = 64 << 20
"""2,048 rounds of 8 draft tokens take 1 MiB; the rest leaves room for longer contexts."""

Reason = Literal["header", "schema", "version", "content"]
REASONS: tuple[Reason, ...] = get_args(Reason)

_TAG_OF_DTYPE = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
_DTYPE_OF_TAG = {tag: dtype for dtype, tag in _TAG_OF_DTYPE.items()}
_BITS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float32": np.float32}
_ROUND_FIELDS = tuple(Round.__dataclass_fields__)
_ROUND_VALUES = attrgetter(*_ROUND_FIELDS)
_LOGP_FIELDS = ("q_logp", "p_logp")
_TEXT_FIELDS = ("producer", "request_id", "tenant", "target_fingerprint")
_COUNT_FIELDS = ("epoch", "seq", "prompt_length", "finished_unix_ms")
_MAX_TEXT = 4096
_MAX_SAMPLING_FIELDS = 64
_MAX_LOGP = 1e-3  # a log-softmax may round to slightly above 0


class UnreadableRecordError(ValueError):
    """Bytes that this reader cannot decode as a trace."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        """Category under which it is counted."""


def encode_trace(trace: Trace) -> bytes:
    """Encode a trace.

    Raises:
        ValueError: the trace is inconsistent or violates ``records.py`` (a shape, a count, a NaN).
    """
    check_trace(trace)
    tensors: dict[str, tuple[str, NDArray[Any]]] = {"token_ids": ("I32", trace.token_ids)}
    features = trace.features
    if features is not None:
        tensors["features.positions"] = ("I32", features.positions)
        tensors["features.rows"] = (_TAG_OF_DTYPE[features.dtype], features.rows)
        if features.scale is not None:
            tensors["features.scale"] = ("F32", features.scale)
    text = json.dumps(_body_of(trace), separators=(",", ":"), allow_nan=False)
    return join_tensors(tensors, {"schema": SCHEMA, "version": str(VERSION), "trace": text})


def decode_trace(blob: bytes) -> Trace:
    """Decode a trace and check all of it.

    The arrays share one writable copy of ``blob``, so torch can wrap them without another copy.

    Raises:
        UnreadableRecordError: says what was found.
    """
    try:
        header = parse_header(blob, len(blob), MAX_HEADER_BYTES)
    except TensorFileError as error:
        raise UnreadableRecordError("header", f"not a trace: {error}") from None
    _check_schema(header.metadata)
    try:
        trace = _trace_of(parse_json(header.metadata["trace"].encode()), header, blob)
        check_trace(trace)
        _check_finite(trace.features)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableRecordError("content", f"trace lacks or misstates {error}") from None
    except ValueError as error:
        raise UnreadableRecordError("content", f"trace contradicts itself: {error}") from None
    return trace


def check_trace(trace: Trace) -> None:
    """Check that a trace is consistent and conforms to ``records.py``.

    Token ids are only checked to be >= 0: the size of the vocabulary is not known here.

    Raises:
        ValueError: names the field and what was expected.
    """
    for name in _TEXT_FIELDS:
        text = getattr(trace, name)
        _require(isinstance(text, str) and len(text) <= _MAX_TEXT, f"{name} must be a short text")
    for name in _COUNT_FIELDS:
        _require(_is_count(getattr(trace, name)), f"{name} must be an integer >= 0")
    ids = trace.token_ids
    _require(
        ids.dtype == np.int32 and ids.ndim == 1, f"token_ids must be int32 [T], got {ids.dtype}"
    )
    _require(ids.size > 0 and int(ids.min()) >= 0, "token_ids must hold at least one id, all >= 0")
    _require(trace.prompt_length <= ids.size, f"prompt_length must be in 0..{ids.size}")
    _check_sampling(trace.sampling)
    for one in trace.rounds:
        _check_round(one, ids.size)
    if trace.features is not None:
        _check_features(trace.features, ids.size)


def _body_of(trace: Trace) -> dict[str, Any]:
    features = trace.features
    return {
        **{name: getattr(trace, name) for name in (*_TEXT_FIELDS, *_COUNT_FIELDS)},
        "sampling": dict(trace.sampling.values),
        "rounds": _columns_of(trace.rounds),
        "layer_ids": None if features is None else list(features.layer_ids),
    }


def _columns_of(rounds: tuple[Round, ...]) -> dict[str, list[Any]]:
    """Rounds as one list per field. A busy server encodes tens of thousands a second."""
    values = zip(*map(_ROUND_VALUES, rounds), strict=True) if rounds else repeat(())
    columns = {name: list(column) for name, column in zip(_ROUND_FIELDS, values, strict=False)}
    for name in _LOGP_FIELDS:
        columns[name] = [_without_infinity(logps) for logps in columns[name]]
    return columns


def _without_infinity(logps: tuple[float, ...] | None) -> tuple[float | None, ...] | None:
    if logps is None or -math.inf not in logps:
        return logps
    return tuple(None if logp == -math.inf else logp for logp in logps)


def _check_schema(metadata: dict[str, str]) -> None:
    schema, version = metadata.get("schema"), metadata.get("version", "")
    if schema != SCHEMA:
        raise UnreadableRecordError("schema", f"record has schema {schema!r}, expected {SCHEMA!r}")
    if not (version.isascii() and version.isdigit() and len(version) < 9):
        raise UnreadableRecordError("version", f"record has version {version!r}, not a number")
    if not 1 <= int(version) <= VERSION:
        raise UnreadableRecordError(
            "version", f"record has {SCHEMA} version {version}, this reader knows 1 to {VERSION}"
        )


def _trace_of(body: Any, header: TensorHeader, blob: bytes) -> Trace:
    memory = bytearray(blob)
    layer_ids = body["layer_ids"]
    return Trace(
        **{name: body[name] for name in (*_TEXT_FIELDS, *_COUNT_FIELDS)},
        sampling=Sampling(body["sampling"]),
        token_ids=_array(header, memory, "token_ids", "I32", np.int32),
        rounds=_rounds_of(body["rounds"]),
        features=None if layer_ids is None else _features_of(tuple(layer_ids), header, memory),
    )


def _rounds_of(columns: Any) -> tuple[Round, ...]:
    in_order = [columns[name] for name in _ROUND_FIELDS]
    return tuple(_round_of(values) for values in zip(*in_order, strict=True))


def _round_of(values: tuple[Any, ...]) -> Round:
    fields = dict(zip(_ROUND_FIELDS, values, strict=True))
    fields["draft_ids"] = tuple(fields["draft_ids"])
    fields["p_logp"] = _logps_of(fields["p_logp"])
    fields["q_logp"] = None if fields["q_logp"] is None else _logps_of(fields["q_logp"])
    return Round(**fields)


def _logps_of(values: list[float | None]) -> tuple[float, ...]:
    return tuple(-math.inf if value is None else value for value in values)


def _features_of(
    layer_ids: tuple[int, ...], header: TensorHeader, memory: bytearray
) -> FeatureRows:
    tag = header.tensors["features.rows"].dtype
    dtype: Any = _DTYPE_OF_TAG.get(tag)
    _require(dtype is not None, f"features.rows has dtype {tag}")
    scaled = "features.scale" in header.tensors
    return FeatureRows(
        positions=_array(header, memory, "features.positions", "I32", np.int32),
        layer_ids=layer_ids,
        dtype=dtype,
        rows=_array(header, memory, "features.rows", tag, _BITS[dtype]),
        scale=_array(header, memory, "features.scale", "F32", np.float32) if scaled else None,
    )


def _array(header: TensorHeader, memory: bytearray, name: str, tag: str, bits: Any) -> NDArray[Any]:
    info = header.tensors[name]
    _require(info.dtype == tag, f"{name} must be {tag}, got {info.dtype}")
    array: NDArray[Any] = np.frombuffer(memory, np.uint8)[info.start : info.end].view(bits)
    return array.reshape(info.shape)


def _check_sampling(sampling: Sampling) -> None:
    """Fields are checked by type only, because the server decides which fields exist. Only the
    temperature, which the trainer reads, is checked by value."""
    values = sampling.values
    _require(isinstance(values, dict), "sampling must hold named values")
    _require(len(values) <= _MAX_SAMPLING_FIELDS, "sampling holds too many values")
    temperature = values.get("temperature")
    _require(_is_finite(temperature, at_least=0), "temperature must be finite and >= 0")
    for name, value in values.items():
        _require(isinstance(name, str) and len(name) <= _MAX_TEXT, "sampling needs short names")
        _require(_is_sampling_value(value), f"{name} must be a number, text, bool or None")


def _check_round(one: Round, num_tokens: int) -> None:
    problem = _round_problem(one, num_tokens, len(one.draft_ids))
    if problem is not None:
        raise ValueError(problem)


def _round_problem(one: Round, num_tokens: int, k: int) -> str | None:
    """What is wrong with a round, or ``None``. Called often: formats texts on failure only."""
    if not (_is_count(one.anchor) and one.anchor < num_tokens):
        return f"anchor must be in 0..{num_tokens - 1}, got {one.anchor!r}"
    if not (isinstance(one.drafter, str) and len(one.drafter) <= _MAX_TEXT):
        return "drafter must be a short text"
    if not (_is_count(one.version) and _is_count(one.next_id) and _is_count(one.draft_k)):
        return "version, next_id and draft_k of a round must be integers >= 0"
    if not all(map(_is_token_id, one.draft_ids)):
        return "draft_ids must be int32 and >= 0"
    if not (_is_count(one.num_accepted) and one.num_accepted <= k):
        return f"num_accepted must be in 0..{k}, got {one.num_accepted!r}"
    if not one.num_accepted <= len(one.p_logp) <= k:
        return f"p_logp must cover {one.num_accepted} kept of {k} tokens, got {len(one.p_logp)}"
    if one.q_logp is not None and len(one.q_logp) != k:
        return f"q_logp must hold {k} values or be None, got {len(one.q_logp)}"
    if not all(map(_is_logp, (*one.p_logp, *(one.q_logp or ())))):
        return "every value of p_logp and q_logp must be a number <= 0"
    if not (_is_finite(one.propensity, at_least=0) and one.propensity <= 1):
        return f"propensity must be in 0..1, got {one.propensity!r}"
    if not (_is_count(one.batch) and one.batch >= 1 and _is_finite(one.step_s, at_least=0)):
        return f"batch must be >= 1 and step_s >= 0, got {one.batch!r} and {one.step_s!r}"
    return None


def _check_features(features: FeatureRows, num_tokens: int) -> None:
    positions, rows, scale = features.positions, features.rows, features.scale
    _require(features.dtype in _BITS, f"features.dtype must be one of {sorted(_BITS)}")
    _require(positions.dtype == np.int32 and positions.ndim == 1, "positions must be int32 [N]")
    _require(bool((np.diff(positions) > 0).all()), "positions must ascend")
    within = positions.size == 0 or 0 <= positions[0] <= positions[-1] < num_tokens
    _require(bool(within), f"positions must be in 0..{num_tokens - 1}")
    _require(all(_is_count(i) for i in features.layer_ids), "layer_ids must be integers >= 0")
    leading = (positions.size, len(features.layer_ids) + 1)
    _require(
        rows.ndim == 3 and rows.shape[:2] == leading and rows.dtype == _BITS[features.dtype],
        f"rows must be {features.dtype} bits [{leading[0]}, {leading[1]}, H], "
        f"got {rows.dtype} {list(rows.shape)}",
    )
    _require(
        (scale is not None) == (features.dtype == "float8_e4m3fn"), "scale belongs to fp8 rows"
    )
    if scale is not None:
        _require(
            scale.dtype == np.float32 and scale.shape == leading, "scale must be float32 [N, m+1]"
        )


def _check_finite(features: FeatureRows | None) -> None:
    if features is None:
        return
    _require(bits_are_finite(features.rows, _TAG_OF_DTYPE[features.dtype]), "rows hold NaN or inf")
    if features.scale is not None:
        _require(bits_are_finite(features.scale, "F32"), "scale holds NaN or inf")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_sampling_value(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return value is None or isinstance(value, int)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_finite(value: Any, *, at_least: float) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= at_least


def _is_logp(value: Any) -> bool:
    if type(value) is float:  # nearly always
        return value <= _MAX_LOGP  # False for NaN
    return _is_number(value) and value <= _MAX_LOGP


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 53  # what a float holds exactly
    return isinstance(value, float)
