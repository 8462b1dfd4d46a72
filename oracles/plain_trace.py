"""What a sound trace is, in plain Python: the definition that ``buffer.codec`` is compared with.

It follows ``buffer/records.py`` field by field and shares no code with the decoder, which checks
whole columns at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from buffer.records import Count, FeatureRows, Trace

_LARGEST_HIDDEN = 1e9
_LARGEST_LOGP = float(np.float32(1e-3))
_LONGEST_TEXT = 4096
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float32": "float32"}


def problems_of(trace: Trace) -> list[str]:
    """Everything that makes a trace senseless; empty if it is sound."""
    return [*_identity(trace), *_sampling(trace), *_rounds(trace), *_rows(trace)]


def _identity(trace: Trace) -> Iterator[str]:
    for name in ("producer", "request_id", "tenant", "target_fingerprint"):
        value = getattr(trace, name)
        if not (isinstance(value, str) and len(value) <= _LONGEST_TEXT):
            yield name
    for name in ("epoch", "seq", "prompt_length", "finished_unix_ms"):
        value = getattr(trace, name)
        if not (type(value) is int and 0 <= value < 2**63):
            yield name
    ids = trace.token_ids
    if str(ids.dtype) != "int32" or not ids.size or min(ids.tolist()) < 0:
        yield "token_ids"
    if trace.prompt_length > ids.size:
        yield "prompt_length beyond the tokens"


def _sampling(trace: Trace) -> Iterator[str]:
    values = trace.sampling.values
    if not isinstance(values, dict) or len(values) > 64:
        yield "sampling"
        return
    temperature: Any = values.get("temperature")
    is_number = type(temperature) in (int, float)
    if not (is_number and temperature >= 0 and temperature < 1e400 and temperature < math.inf):
        yield "temperature"
    for name, value in values.items():
        if len(name) > _LONGEST_TEXT or isinstance(value, list | dict):
            yield "a sampling value"
        if isinstance(value, float) and not math.isfinite(value):
            yield "a sampling value that is no number"


def _rounds(trace: Trace) -> Iterator[str]:
    last_anchor = -1
    drafted = kept_q = kept_p = 0
    drafters = trace.rounds.counts[Count.DRAFTER].tolist()
    if not all(0 <= drafter < len(trace.rounds.drafters) for drafter in drafters):
        yield "a drafter without a name"
        return
    policies = trace.rounds.counts[Count.POLICY].tolist()
    if not all(0 <= policy <= len(trace.rounds.policies) for policy in policies):
        yield "a policy without a name"
        return
    reasons = trace.rounds.counts[Count.REASON].tolist()
    if not all(0 <= reason <= len(trace.rounds.reasons) for reason in reasons):
        yield "a reason without a name"
        return
    names = trace.rounds.note_names
    if not all(isinstance(name, str) for name in names) or len(names) > 64:
        yield "names of notes"
        return
    if list(names) != sorted({*names}):
        yield "notes out of order"
    for one in trace.rounds:
        k = len(one.draft_ids)
        if not last_anchor < one.anchor < len(trace.token_ids):
            yield "anchor"
        last_anchor = one.anchor
        if not 0 <= one.num_accepted <= len(one.p_logp) <= k:
            yield "num_accepted"
        if one.q_logp is not None and len(one.q_logp) != k:
            yield "q_logp"
        if any(not value <= _LARGEST_LOGP for value in (*one.p_logp, *(one.q_logp or ()))):
            yield "a log probability"
        if min((*one.draft_ids, one.version, one.next_id, one.draft_k), default=0) < 0:
            yield "an id"
        if one.batch < 1 or not 0 <= one.propensity <= 1 or not 0 <= one.step_s < math.inf:
            yield "batch, propensity or step_s"
        if not (isinstance(one.drafter, str) and len(one.drafter) <= _LONGEST_TEXT):
            yield "drafter"
        if not (isinstance(one.policy, str) and len(one.policy) <= _LONGEST_TEXT):
            yield "policy"
        if not (isinstance(one.reason, str) and len(one.reason) <= _LONGEST_TEXT):
            yield "reason"
        if any(len(name) > _LONGEST_TEXT or abs(value) == math.inf for name, value in one.notes):
            yield "a note"
        drafted, kept_p = drafted + k, kept_p + len(one.p_logp)
        kept_q += len(one.q_logp or ())
    sizes = trace.rounds.draft_ids.size, trace.rounds.q_logp.size, trace.rounds.p_logp.size
    if sizes != (drafted, kept_q, kept_p):
        yield "values that belong to no round"


def _rows(trace: Trace) -> Iterator[str]:
    rows = trace.features
    if rows is None:
        return
    positions = rows.positions.tolist()
    if positions != sorted(set(positions)):
        yield "positions out of order"
    if positions and not 0 <= positions[0] <= positions[-1] < len(trace.token_ids):
        yield "a position beyond the tokens"
    if any(type(layer) is not int or layer < 0 for layer in rows.layer_ids):
        yield "layer_ids"
    if rows.rows.shape[:2] != (len(positions), len(rows.layer_ids) + 1):
        yield "shape of rows"
    elif _BITS.get(rows.dtype) != str(rows.rows.dtype):
        yield "dtype of rows"
    elif (rows.scale is None) != (rows.dtype != "float8_e4m3fn"):
        yield "scale"
    elif not _largest(rows) <= _LARGEST_HIDDEN:
        yield "a hidden value"


def _largest(rows: FeatureRows) -> float:
    """Largest magnitude of the rows times that of the scales; NaN if there is one among them."""
    values = _values_of(rows)
    largest = float(np.max(np.abs(values), initial=0.0))
    if rows.scale is not None:
        largest *= float(np.max(np.abs(rows.scale), initial=0.0))
    return largest


def _values_of(rows: FeatureRows) -> Any:
    if rows.dtype == "bfloat16":
        return (rows.rows.astype(np.uint32) << 16).view(np.float32)
    if rows.dtype == "float8_e4m3fn":
        return _E4M3[rows.rows]
    return rows.rows


def _e4m3(bits: int) -> float:
    """OCP 8-bit floating point, section 5.2: bias 7, no infinities, one NaN."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_E4M3 = np.array([_e4m3(bits & 127) for bits in range(256)])
