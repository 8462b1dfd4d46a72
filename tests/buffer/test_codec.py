"""A trace comes back as it was written, and nothing else is taken for a trace."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer.codec import LARGEST_VALUE, UnreadableRecordError, decode_trace, encode_trace
from buffer.columns import ENTRY, HEAD, new_record, parse_columns, parse_head
from buffer.records import FIRST_COUNTS, Count, FeatureRows, Real, Round, Rounds, Sampling, Trace

GOLDEN = Path(__file__).parent / "golden"
BITS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float32": np.float32}

texts = st.text(max_size=20)
counts = st.integers(0, 2**62)
ids = st.integers(0, 2**31 - 1)
seconds = st.floats(0, 1e6)
logps = st.floats(max_value=0, allow_nan=False, width=32)  # -inf among them
finite = st.floats(allow_nan=False, allow_infinity=False)
sampling_values = st.dictionaries(
    texts, finite | st.integers() | texts | st.booleans() | st.none(), max_size=5
)

halves = st.integers(-1000, 1000).map(lambda n: n / 2)


def assert_same(left, right):
    """Equal in every field, arrays bit by bit and by type."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


@st.composite
def round_at(draw, anchor):
    k = draw(st.integers(0, 5))
    num_accepted = draw(st.integers(0, k))
    num_seen = draw(st.integers(num_accepted, k))
    q_logp = st.none() | st.lists(logps, min_size=k, max_size=k).map(tuple)
    return Round(
        anchor=anchor,
        drafter=draw(texts),
        version=draw(ids),
        draft_ids=tuple(draw(st.lists(ids, min_size=k, max_size=k))),
        q_logp=draw(q_logp) if k else None,
        p_logp=tuple(draw(st.lists(logps, min_size=num_seen, max_size=num_seen))),
        num_accepted=num_accepted,
        next_id=draw(ids),
        draft_k=draw(ids),
        propensity=draw(st.floats(0, 1)),
        batch=draw(st.integers(1, 1000)),
        step_s=draw(seconds),
        policy=draw(texts),
        step=draw(st.none() | st.integers(0, 2**30 - 1)),
        reason=draw(texts),
        notes=tuple(sorted(draw(st.dictionaries(texts, halves, max_size=3)).items())),
    )


@st.composite
def rounds(draw, num_tokens):
    anchors = sorted(draw(st.sets(st.integers(0, num_tokens - 1), max_size=4)))
    return tuple(draw(round_at(anchor)) for anchor in anchors)


@st.composite
def feature_rows(draw, num_tokens):
    dtype = draw(st.sampled_from(sorted(BITS)))
    positions = sorted(draw(st.sets(st.integers(0, num_tokens - 1))))
    layer_ids = tuple(draw(st.lists(st.integers(0, 99), max_size=3)))
    shape = (len(positions), len(layer_ids) + 1, draw(st.integers(1, 5)))
    seed = draw(st.integers(0, 2**32 - 1))
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype != "float32":  # the upper bits of floats that are finite are finite
        rows = (rows.view(np.uint32) >> (16 if dtype == "bfloat16" else 25)).astype(BITS[dtype])
    scale = np.ones(shape[:2], np.float32) if dtype == "float8_e4m3fn" else None
    return FeatureRows(np.array(positions, np.int32), layer_ids, dtype, rows, scale)


@st.composite
def traces(draw):
    token_ids = np.array(draw(st.lists(ids, min_size=1, max_size=12)), np.int32)
    return Trace(
        producer=draw(texts),
        epoch=draw(counts),
        seq=draw(counts),
        request_id=draw(texts),
        tenant=draw(texts),
        target_fingerprint=draw(texts),
        sampling=Sampling({**draw(sampling_values), "temperature": draw(seconds)}),
        prompt_length=draw(st.integers(0, token_ids.size)),
        token_ids=token_ids,
        rounds=Rounds.of(draw(rounds(token_ids.size))),
        features=draw(st.none() | feature_rows(token_ids.size)),
        finished_unix_ms=draw(counts),
    )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces())
def test_a_trace_comes_back_as_it_was_written(trace):
    assert_same(decode_trace(encode_trace(trace)), trace)


@settings(deadline=None, max_examples=100)
@given(written=rounds(12))
def test_rounds_come_back_one_by_one_from_their_columns(written):
    columns = Rounds.of(written)
    assert tuple(columns) == written
    assert len(columns) == len(written)
    assert columns[1:] == written[1:]
    assert all(columns[i] == written[i] for i in range(-len(written), len(written)))


def test_a_token_that_the_target_excludes_keeps_its_minus_infinity(make_trace):
    excluded = dataclasses.replace(
        make_trace().rounds[0], p_logp=(-2, -math.inf), num_accepted=1, next_id=4
    )
    back = decode_trace(encode_trace(make_trace(rounds=Rounds.of([excluded]))))

    assert back.rounds[0].p_logp == (-2, -math.inf)


def test_traces_of_schema_version_2_stay_readable(make_trace):
    assert_same(decode_trace((GOLDEN / "trace-v2.bin").read_bytes()), make_trace())


def test_a_trace_of_an_older_server_is_refused_by_its_version():
    with pytest.raises(UnreadableRecordError, match=r"version 1, .* knows version 2") as caught:
        decode_trace((GOLDEN / "trace-v1.safetensors").read_bytes())
    assert caught.value.reason == "version"


def test_decoded_arrays_are_views_that_torch_can_wrap_without_a_warning(make_trace):
    record = encode_trace(make_trace())
    trace = decode_trace(record)

    for array in (trace.token_ids, trace.rounds.counts, trace.features.rows):
        assert np.shares_memory(array, np.frombuffer(record, np.uint8))
        torch.from_numpy(array)


def test_what_is_read_only_is_copied_once(make_trace):
    trace = decode_trace(bytes(encode_trace(make_trace())))
    assert trace.features.rows.flags.writeable


def rewritten(trace, *, schema=None, version=None, text=None, columns=None):
    """The record of a trace with parts of it replaced by what another writer might have written.

    ``columns`` maps names to (dtype tag, values); ``None`` leaves a column out.
    """
    record = encode_trace(trace)
    head = parse_head(record)
    old_text, found = parse_columns(record, head)
    changed = {**found, **(columns or {})}
    kept = {name: column for name, column in changed.items() if column is not None}
    if not isinstance(text, bytes):
        text = json.dumps({**json.loads(bytes(old_text)), **(text or {})}).encode()
    blank = new_record(
        head.schema if schema is None else schema,
        head.version if version is None else version,
        text,
        {name: (tag, np.size(values)) for name, (tag, values) in kept.items()},
    )
    for name, (_, values) in kept.items():
        blank.columns[name][:] = np.reshape(values, -1)
    return blank.record.data


def test_unknown_keys_columns_and_rows_of_a_later_writer_are_passed_over(make_trace):
    trace = make_trace()
    later = np.concatenate([trace.rounds.counts, [[-1, -1]]])
    record = rewritten(
        trace, text={"mood": 3}, columns={"novelty": ("F32", np.ones(3)), "counts": ("I32", later)}
    )
    assert_same(decode_trace(record), trace)


def test_rounds_of_an_older_writer_have_no_policy_no_step_and_no_reason(make_trace):
    noted = [
        dataclasses.replace(one, policy="goodput", step=7, reason="probe", is_timed=False)
        for one in make_trace().rounds
    ]
    trace = make_trace(rounds=Rounds.of(noted))
    older = trace.rounds.counts[:FIRST_COUNTS]

    text = {"policies": [], "reasons": [], "notes": []}
    record = rewritten(trace, text=text, columns={"counts": ("I32", older)})

    decoded = decode_trace(encode_trace(trace)).rounds
    noted = [(one.policy, one.step, one.reason, one.is_timed) for one in decoded]
    assert noted == [("goodput", 7, "probe", False)] * 2
    assert_same(decode_trace(record), make_trace())


def test_notes_need_no_field_and_an_older_reader_passes_over_them(make_trace):
    """Rounds of two policies, and one of a policy that noted nothing."""
    plain, notes = make_trace(), ((("a.x", 0.5), ("b.y", -2.0)), ())
    rounds = [dataclasses.replace(r, notes=n) for r, n in zip(plain.rounds, notes, strict=True)]
    trace = make_trace(rounds=Rounds.of(rounds))
    assert [one.notes for one in decode_trace(encode_trace(trace)).rounds] == [*notes]

    # What a reader of before takes of it: all but the key and the column that it does not know.
    older = rewritten(trace, text={"notes": []}, columns={"notes": None})
    assert_same(decode_trace(older), plain)
    assert len(encode_trace(plain)) < len(encode_trace(trace))


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ({"notes": "a.x"}, {}, "notes must be a list of names"),
        ({"notes": ["a.x"]}, {"notes": None}, "notes must be F32 with 1 rows of 2 values"),
        ({"notes": ["a.x"]}, {"notes": ("I32", [1, 2])}, "got I32 with 2"),
        ({"notes": ["a.x"]}, {"notes": ("F32", [1, 2, 3])}, "got F32 with 3"),
        ({"notes": ["a.x"]}, {"notes": ("F32", [1, math.inf])}, "must be a finite number"),
        ({"notes": ["a.x"] * 2}, {"notes": ("F32", [1] * 4)}, "all different and in order"),
        ({"notes": ["b", "a"]}, {"notes": ("F32", [1] * 4)}, "all different and in order"),
        ({"notes": [7]}, {"notes": ("F32", [1, 2])}, "short names"),
        (
            {"notes": [f"{n:02}" for n in range(65)]}, {"notes": ("F32", [1] * 130)},
            "at most 64 notes, got 65",
        ),
    ],
)  # fmt: skip
def test_notes_that_contradict_the_rounds_are_refused(make_trace, text, columns, message):
    with pytest.raises(UnreadableRecordError, match=message):
        decode_trace(rewritten(make_trace(), text=text, columns=columns))


def test_a_column_of_an_unknown_dtype_is_passed_over(make_trace):
    record = rewritten(make_trace(), columns={"novelty": ("F32", np.ones(3))})
    at = bytes(record).index(ENTRY.pack(b"novelty", b"F32", 12))
    ENTRY.pack_into(record, at, b"novelty", b"C64", 12)
    assert_same(decode_trace(record), make_trace())


ROWS = np.zeros((3, 4, 8), np.uint16)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"schema": b"other.thing"}, "schema", "'other.thing', expected"),
        ({"version": 3}, "version", "version 3, this reader knows 2"),
        ({"version": 0}, "version", "version 0"),
        ({"text": b"{"}, "content", "not JSON"),
        ({"text": b"[]"}, "content", "trace"),
        ({"text": b"[" * 100_000}, "content", "nested too deep"),
        ({"text": b'{"a":1,"a":2}'}, "content", "'a' appears twice"),
        ({"text": b'{"a":NaN}'}, "content", "NaN is not a JSON number"),
        ({"text": b"\xff\xfe"}, "content", "not JSON"),
        ({"text": {"prompt_length": 6}}, "content", "prompt_length must be in 0..5"),
        ({"text": {"prompt_length": -1}}, "content", "prompt_length"),
        ({"text": {"seq": True}}, "content", "seq must be an integer"),
        ({"text": {"seq": 1.0}}, "content", "seq must be an integer"),
        ({"text": {"tenant": "t" * 5000}}, "content", "tenant must be a short text"),
        ({"text": {"tenant": None}}, "content", "tenant must be a short text"),
        ({"text": {"num_rounds": None}}, "content", "num_rounds must be an integer"),
        ({"text": {"num_rounds": 3}}, "content", "counts must hold 10 or more rows of 3"),
        ({"text": {"num_rounds": 0}}, "content", "counts must hold"),
        ({"text": {"num_rounds": 2**62}}, "content", "counts must hold"),
        ({"text": {"drafters": "ab"}}, "content", "drafters must be a list"),
        ({"text": {"drafters": ["eagle3"]}}, "content", "drafter must be one of 1 names"),
        ({"text": {"drafters": ["eagle3", 3]}}, "content", "drafter must be a short text"),
        ({"text": {"sampling": {}}}, "content", "temperature"),
        ({"text": {"sampling": {"temperature": -1}}}, "content", "temperature"),
        ({"text": {"sampling": {"temperature": 1, "x": []}}}, "content", "x must be a number"),
        ({"text": {"rows": {"layer_ids": [1]}}}, "content", "hidden_size"),
        (
            {"text": {"rows": {"layer_ids": [1], "hidden_size": 8}}},
            "content",
            r"rows must be \[3, 2, 8\], got 96 values",
        ),
        (
            {"text": {"rows": {"layer_ids": [1, 2, 3], "hidden_size": -8}}},
            "content",
            "rows must be",
        ),
        (
            {"text": {"rows": {"layer_ids": [1, -2, 3], "hidden_size": 8}}},
            "content",
            "layer_ids must be integers",
        ),
        ({"columns": {"token_ids": None}}, "content", "lacks or misstates 'token_ids'"),
        ({"columns": {"rows": None}}, "content", "lacks or misstates 'rows'"),
        ({"columns": {"token_ids": ("I32", [1, -3])}}, "content", ">= 0"),
        ({"columns": {"token_ids": ("I32", [])}}, "content", "at least one id"),
        ({"columns": {"token_ids": ("F32", np.zeros(5))}}, "content", "must be I32, got F32"),
        ({"columns": {"draft_ids": ("I32", [7])}}, "content", r"must hold \[2, 2, 2\] values"),
        ({"columns": {"draft_ids": ("I32", [7, -8])}}, "content", "draft_ids must be >= 0"),
        ({"columns": {"p_logp": ("F32", [-0.1, 3.0])}}, "content", "p_logp must be a number <= 0"),
        ({"columns": {"p_logp": ("F32", [-0.1, np.nan])}}, "content", "p_logp must be a number"),
        ({"columns": {"q_logp": ("F32", [np.inf, 0])}}, "content", "q_logp must be a number <= 0"),
        ({"columns": {"q_logp": ("F32", [])}}, "content", "must hold"),
        ({"columns": {"reals": ("F64", [1, 0, 0])}}, "content", "reals must hold 2 or more rows"),
        (
            {"columns": {"positions": ("I32", [0, 3, 1])}},
            "content",
            "positions must ascend",
        ),
        (
            {"columns": {"positions": ("I32", [0, 1, 5])}},
            "content",
            r"positions must be in 0\.\.4",
        ),
        (
            {"columns": {"positions": ("I32", [-1, 0, 1])}},
            "content",
            r"positions must be in 0\.\.4",
        ),
        ({"columns": {"rows": ("BF16", ROWS + 0x7FC0)}}, "content", "rows reach inf"),
        ({"columns": {"rows": ("BF16", ROWS + 0xFF80)}}, "content", "rows reach inf"),
        ({"columns": {"rows": ("BF16", ROWS + 0x6000)}}, "content", "at most 1e[+]09 is sane"),
        ({"columns": {"rows": ("F8_E4M3", ROWS)}}, "content", "scale belongs to fp8"),
        ({"columns": {"scale": ("F32", np.ones(12))}}, "content", "scale belongs to fp8"),
        ({"columns": {"scale": ("F32", np.ones(3))}}, "content", "scale must hold 12 values"),
        ({"columns": {"rows": ("I32", ROWS)}}, "content", "rows have dtype I32"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_trace_is_refused_by_name(make_trace, changes, reason, message):
    with pytest.raises(UnreadableRecordError, match=message) as caught:
        decode_trace(rewritten(make_trace(), **changes))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (Count.ANCHOR, [1, 5], "anchor must grow"),
        (Count.ANCHOR, [4, 4], "anchor must grow"),
        (Count.ANCHOR, [4, 1], "anchor must grow"),
        (Count.ANCHOR, [-1, 1], "anchor of a round"),
        (Count.DRAFTER, [0, 2], "drafter must be one of 2 names"),
        (Count.VERSION, [0, -1], "version of a round must be an integer >= 0"),
        (Count.NEXT_ID, [-1, 0], "next_id of a round"),
        (Count.DRAFT_K, [-1, 0], "draft_k of a round"),
        (Count.BATCH, [4, 0], "batch must be >= 1"),
        (Count.NUM_ACCEPTED, [3, 0], "num_accepted must be in 0..K"),
        (Count.NUM_ACCEPTED, [0, 1], "num_accepted must be in 0..K"),
        (Count.NUM_ACCEPTED, [-1, 0], "num_accepted of a round"),
        (Count.NUM_P, [1, 1], "p_logp must cover the kept"),
        (Count.NUM_Q, [1, 1], "q_logp must hold a value for each"),
        (Count.NUM_Q, [0, 2], "q_logp must hold a value for each"),
        (Count.NUM_DRAFTED, [3, -1], "num_drafted of a round"),
        (Count.NUM_DRAFTED, [3, 0], "must hold"),
        (Count.NUM_DRAFTED, [2**31 - 1] * 2, "must hold"),
        (Count.POLICY, [0, 1], "policy must be one of 0 names"),
        (Count.REASON, [0, 1], "reason must be one of 0 names"),
    ],
)
def test_rounds_with_senseless_counts_are_refused(make_trace, row, value, message):
    counts = make_trace().rounds.counts.copy()
    counts[row] = value
    with pytest.raises(UnreadableRecordError, match=message) as caught:
        decode_trace(rewritten(make_trace(), columns={"counts": ("I32", counts)}))
    assert caught.value.reason == "content"


@pytest.mark.parametrize(
    ("row", "value"),
    [
        (Real.PROPENSITY, 1.5),
        (Real.PROPENSITY, -0.5),
        (Real.PROPENSITY, math.nan),
        (Real.STEP_S, -1.0),
        (Real.STEP_S, math.inf),
        (Real.STEP_S, math.nan),
    ],
)
def test_rounds_with_senseless_reals_are_refused(make_trace, row, value):
    reals = make_trace().rounds.reals.copy()
    reals[row, 1] = value
    with pytest.raises(UnreadableRecordError, match="propensity must be in"):
        decode_trace(rewritten(make_trace(), columns={"reals": ("F64", reals)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"p_logp": (math.nan, -0.1)},
        {"p_logp": (math.inf, -0.1)},
        {"step_s": math.nan},
        {"num_accepted": 3},
        {"draft_ids": (7, -8)},
        {"q_logp": (-0.1,)},
    ],
)
def test_a_senseless_trace_is_refused_before_it_is_written(make_trace, fields):
    senseless = dataclasses.replace(make_trace().rounds[0], **fields)
    with pytest.raises(ValueError, match=r"must|logp"):
        encode_trace(make_trace(rounds=Rounds.of([senseless])))


@pytest.mark.parametrize("dtype", sorted(BITS))
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_largest_hidden_value_is_found_whatever_the_bits(dtype, data):
    """Against torch, which converts every value: a record is refused just when its rows are not
    finite or exceed the bound."""
    bits = {"bfloat16": 16, "float8_e4m3fn": 8, "float32": 32}[dtype]
    raw = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=9))
    rows = np.array(raw, f"u{bits // 8}").view(BITS[dtype]).reshape(1, 1, -1)
    scale = data.draw(st.sampled_from([1e-12, 0.3, 1e7])) if bits == 8 else 1.0
    features = FeatureRows(
        np.zeros(1, np.int32), (), dtype, rows,
        np.full((1, 1), scale, np.float32) if bits == 8 else None,
    )  # fmt: skip
    token_ids = np.array([5], np.int32)
    trace = Trace("", 0, 0, "", "", "", Sampling({"temperature": 0}), 0, token_ids,
                  Rounds.of(), features, 0)  # fmt: skip
    wide = torch.from_numpy(rows).view(getattr(torch, dtype)).float() * np.float32(scale)
    is_sane = bool((wide.abs() <= LARGEST_VALUE).all())

    try:
        decode_trace(encode_trace(trace))
    except UnreadableRecordError:
        assert not is_sane
    else:
        assert is_sane


def record_of(num_columns=0, text=b"", table=b"", rest=b"", schema=b"slipstream.trace"):
    return HEAD.pack(schema, 2, num_columns, len(text)) + table + text + rest


def column(num_bytes, name=b"a", tag=b"U8"):
    return ENTRY.pack(name, tag, num_bytes)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes are too few"),
        (record_of()[:-1], "23 bytes are too few"),
        (HEAD.pack(b"slipstream.trace", 2, 0, 2**32 - 1), "claims 4294967319 bytes"),
        (record_of(num_columns=1), "the header claims 56 bytes, the record has 24"),
        (record_of(num_columns=257), "names 257 columns, at most 256"),
        (record_of(1, table=column(9), rest=bytes(8)), "claims 9 bytes from byte 56 on"),
        (record_of(1, table=column(2**64 - 1), rest=bytes(8)), "claims 18446744073709551615"),
        (record_of(1, table=column(8), rest=bytes(16)), "columns end at byte 64"),
        (record_of(1, table=column(7), rest=bytes(7)), "columns end at byte 64"),
        (record_of(1, table=column(6, tag=b"I32"), rest=bytes(8)), "no multiple of 4"),
        (record_of(2, table=column(8) + column(0), rest=bytes(8)), "column a appears twice"),
        (record_of(1, table=column(9, name=b"\xff\n"), rest=bytes(8)), r"column \\xff"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused_before_anything_is_allocated(blob, message):
    with pytest.raises(UnreadableRecordError, match=message) as caught:
        decode_trace(blob)
    assert caught.value.reason == "header"


def test_every_truncated_trace_is_refused(make_trace):
    blob = encode_trace(make_trace())
    for length in range(len(blob)):
        with pytest.raises(UnreadableRecordError):
            decode_trace(blob[:length])


def test_every_trace_with_bytes_behind_it_is_refused(make_trace):
    blob = bytes(encode_trace(make_trace()))
    for length in range(1, 20):
        with pytest.raises(UnreadableRecordError):
            decode_trace(blob + bytes(length))


@settings(
    deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_bytes_change_no_other_error_escapes(make_trace, data):
    """And what is taken for a trace all the same can be used like one."""
    blob = bytearray(encode_trace(make_trace()))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        trace = decode_trace(blob)
    except UnreadableRecordError:
        return
    for one in trace.rounds:
        assert one.num_accepted <= len(one.p_logp) <= len(one.draft_ids)
        assert one.anchor < trace.token_ids.size
    encode_trace(trace)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_rubbish_is_never_a_trace_and_never_another_error(data):
    head = data.draw(st.sampled_from([b"", b"slipstream.trace", b"slipstream.trace\2\0"]))
    with pytest.raises(UnreadableRecordError):
        decode_trace(head + data.draw(st.binary(max_size=300)))
