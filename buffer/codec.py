"""Encodes a trace as flat columns, and decodes it without trusting a byte of it.

The numbers of a trace are columns (see ``columns.py``), so that nothing is done for each round in
Python, neither to read them nor to check them:

    token_ids I32 [T] | counts I32 [14, R] | reals F64 [2, R]      of R rounds, ``records.Rounds``
    draft_ids I32 | q_logp F32 | p_logp F32 | those of ``considered``   of one round after another
    notes F32 [names, R]                                     what policies noted, see ``notes.py``
    positions I32 [N] | scale F32 [N, m + 1], for fp8 rows alone
    rows [N, m + 1, H], in the dtype and with the bytes that were captured

The rest is a JSON object: identity, sampling, names of drafters, policies, reasons and notes,
number of rounds, tapped layers and H. A reader passes over columns, rows of ``counts`` and
``reals``, and keys that it does not know; rows of ``counts`` and notes that an older writer did not
have are 0 and none. A change that an old reader could misread gets a new version. Version 1, a
safetensors blob, is not read any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from buffer.blocks import Blocks
from buffer.columns import ColumnsError, new_record, parse_columns, parse_head
from buffer.considered import check_considered, considered_columns, considered_of
from buffer.interface import Payload
from buffer.notes import check_notes, note_columns, notes_of
from buffer.plain_values import is_count, is_sampling_value, is_short_text, is_temperature
from buffer.records import FIRST_COUNTS, Count, FeatureRows, Real, Rounds, Sampling, Trace
from buffer.tensors import largest_magnitude, parse_json

SCHEMA = b"slipstream.trace"
VERSION = 2
_VERSION_1 = b'{"__metadata__":{"schema":"slipstream.trace"'
"""How the header of a trace of version 1 began, after its length."""

Reason = Literal["header", "schema", "version", "content"]
REASONS: tuple[Reason, ...] = get_args(Reason)

LARGEST_VALUE = 1e9
"""Larger hidden values are damage: real ones stay below 1e6, and squares must stay finite."""

_TAG_OF_DTYPE = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
_DTYPE_OF_TAG = {tag: dtype for dtype, tag in _TAG_OF_DTYPE.items()}
_BITS: dict[str, Any] = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float32": np.float32}
_TEXT_FIELDS = ("producer", "request_id", "tenant", "target_fingerprint")
_COUNT_FIELDS = ("epoch", "seq", "prompt_length", "finished_unix_ms")
_MAX_SAMPLING_FIELDS = 64
_MAX_LOGP = 1e-3  # a log-softmax may round to slightly above 0


_Columns = dict[str, tuple[str, NDArray[Any]]]
"""Name -> (dtype tag, values)."""


class UnreadableRecordError(ValueError):
    """Bytes that this reader cannot decode as a trace."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        """Category under which it is counted."""


def encode_trace(trace: Trace) -> memoryview:
    """Encode a trace.

    Raises:
        ValueError: the trace is inconsistent or violates ``records.py`` (a shape, a count, a NaN).
    """
    record, rows = encode_without_rows(trace)
    if trace.features is not None:
        rows[:] = trace.features.rows
    return record


def encode_without_rows(
    trace: Trace, blocks: Blocks | None = None
) -> tuple[memoryview, NDArray[Any]]:
    """Encode all of a trace but its hidden rows, which the caller then copies into their place.

    Args:
        trace: only shape and dtype of its hidden rows are looked at.
        blocks: where memory for the record comes from.

    Returns:
        The record, and a view of the place of its rows, shaped like them; [0, 0, 0] if it has none.

    Raises:
        ValueError: as ``encode_trace``.
    """
    check_trace(trace)
    values = _values_of(trace)
    features = trace.features
    sizes = {name: (tag, column.size) for name, (tag, column) in values.items()}
    if features is not None:
        sizes["rows"] = (_TAG_OF_DTYPE[features.dtype], math.prod(features.rows.shape))
    text = json.dumps(_text_of(trace), separators=(",", ":"), allow_nan=False).encode()
    blank = new_record(SCHEMA, VERSION, text, sizes, blocks)
    for name, (_, column) in values.items():
        blank.columns[name][:] = column.reshape(-1)
    if features is None:
        return blank.record.data, np.zeros((0, 0, 0), np.uint8)
    return blank.record.data, blank.columns["rows"].reshape(features.rows.shape)


def decode_trace(record: Payload) -> Trace:
    """Decode a trace and check all of it.

    The arrays are views of ``record``; of a writable copy of it if it is read-only, so that torch
    can wrap them.

    Raises:
        UnreadableRecordError: says what was found.
    """
    [trace] = decode_traces([record])
    if isinstance(trace, UnreadableRecordError):
        raise trace
    return trace


def identity_of(record: Payload) -> tuple[str, int, int]:
    """(producer, epoch, seq) of a trace, of which nothing else is looked at.

    Raises:
        UnreadableRecordError: as ``decode_trace``.
    """
    view = memoryview(record)
    try:
        head = parse_head(view)
        _check_schema(view, head.schema, head.version)
        text = parse_json(bytes(parse_columns(view, head)[0]))
        producer, epoch, seq = text["producer"], text["epoch"], text["seq"]
    except ColumnsError as error:
        raise UnreadableRecordError("header", f"not a trace: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UnreadableRecordError):
            raise
        raise UnreadableRecordError("content", f"trace lacks or misstates {error}") from None
    if not (is_short_text(producer) and is_count(epoch) and is_count(seq)):
        raise UnreadableRecordError("content", "trace misstates producer, epoch or seq")
    return producer, epoch, seq


def decode_traces(records: Iterable[Payload]) -> list[Trace | UnreadableRecordError]:
    """Decode some traces as ``decode_trace`` does each, in two thirds of the time.

    The hidden rows of all are looked at last: a megabyte that streams through the processor's
    cache takes the interpreter's own code and data out of it.

    Returns:
        For each record the trace, or what is wrong with it.
    """
    decoded = [_attempt(_without_values, record) for record in records]
    return [
        one if isinstance(one, UnreadableRecordError) else _attempt(_with_sane_values, one)
        for one in decoded
    ]


_Given = TypeVar("_Given")


def _attempt(decode: Callable[[_Given], Trace], given: _Given) -> Trace | UnreadableRecordError:
    try:
        return decode(given)
    except UnreadableRecordError as error:
        return error
    except ColumnsError as error:
        return UnreadableRecordError("header", f"not a trace: {error}")
    except (KeyError, TypeError, AttributeError) as error:
        return UnreadableRecordError("content", f"trace lacks or misstates {error}")
    except ValueError as error:
        return UnreadableRecordError("content", f"trace contradicts itself: {error}")


def _without_values(record: Payload) -> Trace:
    view = memoryview(record)
    view = memoryview(bytearray(view)) if view.readonly else view
    head = parse_head(view)
    _check_schema(view, head.schema, head.version)
    text, columns = parse_columns(view, head)
    trace = _trace_of(parse_json(bytes(text)), columns)
    check_trace(trace)
    return trace


def _with_sane_values(trace: Trace) -> Trace:
    _check_values(trace.features)
    return trace


def check_trace(trace: Trace) -> None:
    """Check that a trace is consistent and conforms to ``records.py``; values of hidden rows aside.

    Token ids are only checked to be >= 0: the size of the vocabulary is not known here.

    Raises:
        ValueError: names the field and what was expected.
    """
    for name in _TEXT_FIELDS:
        if not is_short_text(getattr(trace, name)):
            raise ValueError(f"{name} must be a short text")
    for name in _COUNT_FIELDS:
        if not is_count(getattr(trace, name)):
            raise ValueError(f"{name} must be an integer >= 0")
    ids = trace.token_ids
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise ValueError(f"token_ids must be int32 [T], got {ids.dtype} {list(ids.shape)}")
    if ids.size == 0 or ids.min() < 0:
        raise ValueError("token_ids must hold at least one id, all >= 0")
    if trace.prompt_length > ids.size:
        raise ValueError(f"prompt_length must be in 0..{ids.size}")
    _check_sampling(trace.sampling)
    _check_rounds(trace.rounds, ids.size)
    if trace.features is not None:
        _check_features(trace.features, ids.size)


# ---- from a trace to its parts, and back ---------------------------------------------------------


def _text_of(trace: Trace) -> dict[str, Any]:
    features = trace.features
    shape = None
    if features is not None:
        shape = {"layer_ids": list(features.layer_ids), "hidden_size": features.rows.shape[2]}
    return {
        **{name: getattr(trace, name) for name in (*_TEXT_FIELDS, *_COUNT_FIELDS)},
        "sampling": dict(trace.sampling.values),
        "drafters": list(trace.rounds.drafters),
        "policies": list(trace.rounds.policies),
        "reasons": list(trace.rounds.reasons),
        "notes": list(trace.rounds.note_names),
        "num_rounds": len(trace.rounds),
        "rows": shape,
    }


def _values_of(trace: Trace) -> _Columns:
    """Name -> (dtype tag, values) of every column but the hidden rows."""
    rounds, features = trace.rounds, trace.features
    values: _Columns = {
        "token_ids": ("I32", trace.token_ids),
        "counts": ("I32", rounds.counts),
        "reals": ("F64", rounds.reals),
        "draft_ids": ("I32", rounds.draft_ids),
        "q_logp": ("F32", rounds.q_logp),
        "p_logp": ("F32", rounds.p_logp),
        **considered_columns(rounds),
        **note_columns(rounds),
    }
    if features is not None:
        values["positions"] = "I32", features.positions
        if features.scale is not None:
            values["scale"] = "F32", features.scale
    return values


def _check_schema(record: memoryview, schema: bytes, version: int) -> None:
    if bytes(record[8 : 8 + len(_VERSION_1)]) == _VERSION_1:
        raise UnreadableRecordError(
            "version",
            f"record is a slipstream.trace of version 1, written by an older server; this reader "
            f"knows version {VERSION} alone. It is put aside; traces of the present server follow",
        )
    if schema != SCHEMA:
        raise UnreadableRecordError("schema", f"record has schema {schema!r}, expected {SCHEMA!r}")
    if version != VERSION:
        raise UnreadableRecordError(
            "version", f"record has slipstream.trace version {version}, this reader knows {VERSION}"
        )


def _trace_of(text: Any, columns: _Columns) -> Trace:
    return Trace(
        **{name: text[name] for name in (*_TEXT_FIELDS, *_COUNT_FIELDS)},
        sampling=Sampling(text["sampling"]),
        token_ids=_column(columns, "token_ids", "I32"),
        rounds=_rounds_of(text, columns),
        features=None if text["rows"] is None else _features_of(text["rows"], columns),
    )


def _rounds_of(text: Any, columns: _Columns) -> Rounds:
    num_rounds, drafters = text["num_rounds"], text["drafters"]
    policies, reasons = text.get("policies", []), text.get("reasons", [])
    if not is_count(num_rounds):
        raise ValueError("num_rounds must be an integer >= 0")
    for name, kinds in (("drafters", drafters), ("policies", policies), ("reasons", reasons)):
        if not isinstance(kinds, list):
            raise ValueError(f"{name} must be a list of names")
    return Rounds(
        _table(columns, "counts", "I32", len(Count), num_rounds, FIRST_COUNTS),
        _table(columns, "reals", "F64", len(Real), num_rounds, len(Real)),
        _column(columns, "draft_ids", "I32"),
        _column(columns, "q_logp", "F32"),
        _column(columns, "p_logp", "F32"),
        tuple(drafters),
        tuple(policies),
        tuple(reasons),
        *considered_of(columns, num_rounds),
        *notes_of(text.get("notes", []), columns, num_rounds),
    )


def _table(
    columns: _Columns, name: str, tag: str, num_rows: int, num_rounds: int, least: int
) -> NDArray[Any]:
    """The first ``num_rows`` rows of a column that has ``num_rounds`` values in each; from
    ``least`` on, missing ones are 0."""
    values = _column(columns, name, tag)
    found_rows, rest = divmod(values.size, num_rounds) if num_rounds else (num_rows, values.size)
    if found_rows < least or rest:
        raise ValueError(
            f"{name} must hold {least} or more rows of {num_rounds} values, got {values.size}"
        )
    if found_rows < num_rows:
        missing = np.zeros((num_rows - found_rows) * num_rounds, values.dtype)
        values = np.concatenate((values, missing))
    return values[: num_rows * num_rounds].reshape(num_rows, num_rounds)


def _features_of(shape: Any, columns: _Columns) -> FeatureRows:
    tag, rows = columns["rows"]
    dtype: Any = _DTYPE_OF_TAG.get(tag)
    if dtype is None:
        raise ValueError(f"rows have dtype {tag}")
    layer_ids, hidden_size = tuple(shape["layer_ids"]), shape["hidden_size"]
    positions = _column(columns, "positions", "I32")
    leading = positions.size, len(layer_ids) + 1
    if not is_count(hidden_size) or math.prod(leading) * hidden_size != rows.size:
        raise ValueError(
            f"rows must be [{leading[0]}, {leading[1]}, {hidden_size}], got {rows.size} values"
        )
    scale = _column(columns, "scale", "F32") if "scale" in columns else None
    if scale is not None and scale.size != math.prod(leading):
        raise ValueError(f"scale must hold {math.prod(leading)} values, got {scale.size}")
    return FeatureRows(
        positions=positions,
        layer_ids=layer_ids,
        dtype=dtype,
        rows=rows.reshape(*leading, hidden_size),
        scale=None if scale is None else scale.reshape(leading),
    )


def _column(columns: _Columns, name: str, tag: str) -> NDArray[Any]:
    found, values = columns[name]
    if found != tag:
        raise ValueError(f"{name} must be {tag}, got {found}")
    return values


# ---- checks --------------------------------------------------------------------------------------


def _check_sampling(sampling: Sampling) -> None:
    """Fields are checked by type only, because the server decides which fields exist. Only the
    temperature, which the trainer reads, is checked by value."""
    values = sampling.values
    if not isinstance(values, dict):
        raise ValueError("sampling must hold named values")
    if len(values) > _MAX_SAMPLING_FIELDS:
        raise ValueError("sampling holds too many values")
    if not is_temperature(values.get("temperature")):
        raise ValueError("temperature must be finite and >= 0")
    for name, value in values.items():
        if not is_short_text(name):
            raise ValueError("sampling needs short names")
        if not is_sampling_value(value):
            raise ValueError(f"{name} must be a number, text, bool or None")


def _check_rounds(rounds: Rounds, num_tokens: int) -> None:
    """Each check is of whole columns."""
    num_rounds = len(rounds)
    _check_column("counts", rounds.counts, np.int32, (len(Count), num_rounds))
    _check_column("reals", rounds.reals, np.float64, (len(Real), num_rounds))
    _check_column("draft_ids", rounds.draft_ids, np.int32, (rounds.draft_ids.size,))
    _check_column("q_logp", rounds.q_logp, np.float32, (rounds.q_logp.size,))
    _check_column("p_logp", rounds.p_logp, np.float32, (rounds.p_logp.size,))
    names = {"drafter": rounds.drafters, "policy": rounds.policies, "reason": rounds.reasons}
    for name, kinds in names.items():
        if not all(map(is_short_text, kinds)):
            raise ValueError(f"{name} must be a short text")
    _check_lengths(rounds)
    check_considered(rounds)
    check_notes(rounds)
    if num_rounds:
        _check_counts(rounds, num_tokens)
        _check_reals(rounds)


def _check_column(name: str, column: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if column.dtype != dtype or column.shape != shape:
        raise ValueError(
            f"{name} of rounds must be {np.dtype(dtype)} {list(shape)}, "
            f"got {column.dtype} {list(column.shape)}"
        )


def _check_lengths(rounds: Rounds) -> None:
    sums = rounds.counts[[Count.NUM_DRAFTED, Count.NUM_Q, Count.NUM_P]].sum(axis=1).tolist()
    sizes = [rounds.draft_ids.size, rounds.q_logp.size, rounds.p_logp.size]
    if sums != sizes:
        raise ValueError(
            f"draft_ids, q_logp and p_logp must hold {sums} values, as rounds count, got {sizes}"
        )


def _check_counts(rounds: Rounds, num_tokens: int) -> None:
    counts = rounds.counts
    if counts.min() < 0:
        row = Count(int(counts.argmin()) // counts.shape[1])
        raise ValueError(f"{row.name.lower()} of a round must be an integer >= 0")
    anchor = counts[Count.ANCHOR]
    if anchor[-1] >= num_tokens or not (anchor[1:] > anchor[:-1]).all():
        raise ValueError(f"anchor must grow from round to round, within 0..{num_tokens - 1}")
    kinds = (Count.DRAFTER, rounds.drafters, 0), (Count.POLICY, rounds.policies, 1)
    for row, names, first in (*kinds, (Count.REASON, rounds.reasons, 1)):
        if counts[row].max() >= len(names) + first:
            raise ValueError(f"{row.name.lower()} must be one of {len(names)} names")
    if not counts[Count.BATCH].all():
        raise ValueError("batch must be >= 1")
    # NUM_ACCEPTED, NUM_P and NUM_DRAFTED are neighbours.
    in_order = counts[Count.NUM_ACCEPTED : Count.NUM_DRAFTED + 1]
    if not (in_order[:-1] <= in_order[1:]).all():
        raise ValueError(
            "num_accepted must be in 0..K, and p_logp must cover the kept of K draft tokens"
        )
    num_q = counts[Count.NUM_Q]
    if not ((num_q == counts[Count.NUM_DRAFTED]) | (num_q == 0)).all():
        raise ValueError("q_logp must hold a value for each draft token, or none")
    if rounds.draft_ids.size and rounds.draft_ids.min() < 0:
        raise ValueError("draft_ids must be >= 0")


def _check_reals(rounds: Rounds) -> None:
    for name in ("p_logp", "q_logp"):
        logps = getattr(rounds, name)
        if logps.size and not logps.max() <= _MAX_LOGP:  # also when one is NaN
            raise ValueError(f"every value of {name} must be a number <= 0")
    propensity, step_s = rounds.reals.max(axis=1).tolist()
    if not (rounds.reals.min() >= 0 and propensity <= 1 and step_s < math.inf):
        raise ValueError("propensity must be in 0..1, and step_s finite and >= 0")


def _check_features(features: FeatureRows, num_tokens: int) -> None:
    positions, rows, scale = features.positions, features.rows, features.scale
    if features.dtype not in _BITS:
        raise ValueError(f"features.dtype must be one of {sorted(_BITS)}")
    if positions.dtype != np.int32 or positions.ndim != 1:
        raise ValueError("positions must be int32 [N]")
    if not (positions[1:] > positions[:-1]).all():
        raise ValueError("positions must ascend")
    if positions.size and not 0 <= positions[0] <= positions[-1] < num_tokens:
        raise ValueError(f"positions must be in 0..{num_tokens - 1}")
    if not all(map(is_count, features.layer_ids)):
        raise ValueError("layer_ids must be integers >= 0")
    leading = (positions.size, len(features.layer_ids) + 1)
    if rows.ndim != 3 or rows.shape[:2] != leading or rows.dtype != _BITS[features.dtype]:
        raise ValueError(
            f"rows must be {features.dtype} bits [{leading[0]}, {leading[1]}, H], "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if (scale is not None) != (features.dtype == "float8_e4m3fn"):
        raise ValueError("scale belongs to fp8 rows")
    if scale is not None and (scale.dtype != np.float32 or scale.shape != leading):
        raise ValueError("scale must be float32 [N, m + 1]")


def _check_values(features: FeatureRows | None) -> None:
    """Refuse hidden rows that hold a NaN or infinity, or that are absurdly large."""
    if features is None:
        return
    largest = largest_magnitude(features.rows, _TAG_OF_DTYPE[features.dtype])
    if features.scale is not None:
        largest *= largest_magnitude(features.scale, "F32")
    if not largest <= LARGEST_VALUE:
        raise ValueError(f"hidden rows reach {largest:g}, at most {LARGEST_VALUE:g} is sane")
