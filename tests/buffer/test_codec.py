"""A trace comes back as it was written, and nothing else is taken for a trace."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer.codec import UnreadableRecordError, decode_trace, encode_trace
from buffer.records import FeatureRows, Round, Sampling, Trace
from buffer.tensors import join_tensors, parse_header

GOLDEN = Path(__file__).parent / "golden" / "trace-v1.safetensors"
BITS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float32": np.float32}

texts = st.text(max_size=20)
counts = st.integers(0, 2**62)
ids = st.integers(0, 2**31 - 1)
seconds = st.floats(0, 1e6)
finite = st.floats(allow_nan=False, allow_infinity=False)
sampling_values = st.dictionaries(
    texts, finite | st.integers() | texts | st.booleans() | st.none(), max_size=5
)


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
def rounds(draw, num_tokens):
    k = draw(st.integers(0, 5))
    num_accepted = draw(st.integers(0, k))
    logps = st.floats(max_value=0, allow_nan=False)  # -inf among them
    num_seen = draw(st.integers(num_accepted, k))
    q_logp = st.none() | st.lists(logps, min_size=k, max_size=k).map(tuple)
    return Round(
        anchor=draw(st.integers(0, num_tokens - 1)),
        drafter=draw(texts),
        version=draw(counts),
        draft_ids=tuple(draw(st.lists(ids, min_size=k, max_size=k))),
        q_logp=draw(q_logp),
        p_logp=tuple(draw(st.lists(logps, min_size=num_seen, max_size=num_seen))),
        num_accepted=num_accepted,
        next_id=draw(ids),
        draft_k=draw(counts),
        propensity=draw(st.floats(0, 1)),
        batch=draw(st.integers(1, 1000)),
        step_s=draw(seconds),
    )


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
        rounds=tuple(draw(st.lists(rounds(token_ids.size), max_size=4))),
        features=draw(st.none() | feature_rows(token_ids.size)),
        finished_unix_ms=draw(counts),
    )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces())
def test_a_trace_comes_back_as_it_was_written(trace):
    assert_same(decode_trace(encode_trace(trace)), trace)


def test_a_token_that_the_target_excludes_keeps_its_minus_infinity(make_trace):
    excluded = dataclasses.replace(
        make_trace().rounds[0], p_logp=(-0.2, -math.inf), num_accepted=1, next_id=4
    )
    back = decode_trace(encode_trace(make_trace(rounds=(excluded,))))

    assert back.rounds[0].p_logp == (-0.2, -math.inf)


def test_any_safetensors_reader_opens_a_trace_and_sees_its_true_types(make_trace, tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(encode_trace(make_trace()))

    tensors = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: one["dtype"] for name, one in tensors.items()} == {
        "token_ids": "I32",
        "features.positions": "I32",
        "features.rows": "BF16",
    }
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["schema"] == "slipstream.trace"
        assert file.get_tensor("token_ids").tolist() == [5, 6, 7, 8, 9]


def test_traces_of_schema_version_1_stay_readable(make_trace):
    assert_same(decode_trace(GOLDEN.read_bytes()), make_trace())


def test_decoded_arrays_can_be_wrapped_by_torch_without_a_warning(make_trace):
    assert decode_trace(encode_trace(make_trace())).features.rows.flags.writeable


def rewritten(trace, *, metadata=None, body=None, tensors=None):
    """The blob of a trace with parts of it replaced by what another writer might have written."""
    blob = encode_trace(trace)
    header = parse_header(blob, len(blob), 1 << 20)
    old = {
        name: (info.dtype, np.frombuffer(blob, np.uint8)[info.start : info.end])
        for name, info in header.tensors.items()
    }
    shapes = {name: info.shape for name, info in header.tensors.items()}
    bits = {"I32": np.int32, "BF16": np.uint16}
    kept = {
        name: (tag, raw.view(bits[tag]).reshape(shapes[name])) for name, (tag, raw) in old.items()
    }
    text = json.dumps({**json.loads(header.metadata["trace"]), **(body or {})})
    return join_tensors(
        {**kept, **(tensors or {})}, {**header.metadata, "trace": text, **(metadata or {})}
    )


def test_unknown_keys_and_tensors_of_a_later_writer_are_ignored(make_trace):
    blob = rewritten(
        make_trace(),
        metadata={"note": "new"},
        body={"mood": 3},
        tensors={"novelty": ("I32", np.zeros(3, np.int32))},
    )
    assert_same(decode_trace(blob), make_trace())


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"metadata": {"schema": "other.thing"}}, "schema", "'other.thing', expected"),
        ({"metadata": {"version": "2"}}, "version", "version 2, this reader knows 1 to 1"),
        ({"metadata": {"version": "one"}}, "version", "'one', not a number"),
        ({"metadata": {"version": "0"}}, "version", "version 0"),
        ({"metadata": {"trace": "{"}}, "content", "not JSON"),
        ({"metadata": {"trace": "[]"}}, "content", "trace"),
        ({"metadata": {"trace": "[" * 100_000}}, "content", "nested too deep"),
        ({"metadata": {"trace": '{"a":1,"a":2}'}}, "content", "'a' appears twice"),
        ({"body": {"prompt_length": 6}}, "content", "prompt_length must be in 0..5"),
        ({"body": {"prompt_length": -1}}, "content", "prompt_length"),
        ({"body": {"seq": True}}, "content", "seq must be an integer"),
        ({"body": {"seq": 1.0}}, "content", "seq must be an integer"),
        ({"body": {"tenant": "t" * 5000}}, "content", "tenant must be a short text"),
        ({"body": {"tenant": None}}, "content", "tenant must be a short text"),
        ({"body": {"rounds": {}}}, "content", "anchor"),
        ({"body": {"rounds": None}}, "content", "trace"),
        ({"body": {"layer_ids": [1]}}, "content", r"rows must be bfloat16 bits \[3, 2, H\]"),
        ({"body": {"sampling": {}}}, "content", "temperature"),
        ({"tensors": {"token_ids": ("I32", np.array([1, -3], np.int32))}}, "content", ">= 0"),
        ({"tensors": {"token_ids": ("I32", np.zeros(0, np.int32))}}, "content", "at least one id"),
        ({"tensors": {"token_ids": ("U32", np.zeros(5, np.int32))}}, "content", "must be I32"),
        ({"tensors": {"token_ids": ("I32", np.zeros((5, 1), np.int32))}}, "content", "token_ids"),
        (
            {"tensors": {"features.positions": ("I32", np.array([0, 3, 1], np.int32))}},
            "content",
            "positions must ascend",
        ),
        (
            {"tensors": {"features.positions": ("I32", np.array([0, 1, 5], np.int32))}},
            "content",
            r"positions must be in 0\.\.4",
        ),
        (
            {"tensors": {"features.rows": ("BF16", np.full((3, 4, 8), 0x7FC0, np.uint16))}},
            "content",
            "rows hold NaN",
        ),
        (
            {"tensors": {"features.rows": ("F8_E4M3", np.zeros((3, 4, 8), np.uint8))}},
            "content",
            "scale belongs to fp8",
        ),
        (
            {"tensors": {"features.rows": ("I32", np.zeros((3, 4, 8), np.int32))}},
            "content",
            "features.rows has dtype I32",
        ),
    ],
)  # fmt: skip
def test_a_record_that_is_no_trace_is_refused_by_name(make_trace, changes, reason, message):
    with pytest.raises(UnreadableRecordError, match=message) as caught:
        decode_trace(rewritten(make_trace(), **changes))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_accepted", 3),
        ("num_accepted", -1),
        ("anchor", 5),
        ("draft_ids", [7, -8]),
        ("draft_ids", [7]),
        ("draft_ids", [7, 2**31]),
        ("draft_ids", "ab"),
        ("p_logp", [-0.1]),
        ("p_logp", [-0.1, -0.1, -0.1]),
        ("p_logp", [-0.1, 3.0]),
        ("p_logp", [-0.1, "x"]),
        ("q_logp", [-0.1]),
        ("q_logp", [-0.1, 10**400]),
        ("propensity", 1.5),
        ("propensity", None),
        ("batch", 0),
        ("step_s", -1.0),
        ("step_s", 10**400),
        ("version", -1),
        ("next_id", -1),
        ("drafter", 3),
    ],
)
def test_a_round_with_senseless_counts_is_refused(make_trace, field, value):
    one = make_trace(rounds=make_trace().rounds[:1])
    text = parse_header(encode_trace(one), len(encode_trace(one)), 1 << 20).metadata["trace"]
    columns = json.loads(text)["rounds"]
    with pytest.raises(UnreadableRecordError) as caught:
        decode_trace(rewritten(one, body={"rounds": {**columns, field: [value]}}))
    assert caught.value.reason == "content"


@pytest.mark.parametrize(
    "fields",
    [
        {"p_logp": (math.nan, -0.1)},
        {"p_logp": (math.inf, -0.1)},
        {"step_s": math.nan},
        {"num_accepted": 3},
    ],
)
def test_a_senseless_trace_is_refused_before_it_is_written(make_trace, fields):
    senseless = dataclasses.replace(make_trace().rounds[0], **fields)
    with pytest.raises(ValueError, match=r"must|logp"):
        encode_trace(make_trace(rounds=(senseless,)))


def header_of(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


def tensor_at(start, end, dtype="U8", shape=(1,), data=b""):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header_of(json.dumps({"a": entry}).encode(), data)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\xff" * 8, "the header claims"),
        ((2**62).to_bytes(8, "little") + b"{}", "the header claims"),
        (header_of(b"[]"), "must be a JSON object, got list"),
        (header_of(b"\xff\xfe"), "not JSON"),
        (header_of(b'{"a":NaN}'), "NaN is not a JSON number"),
        (header_of(b'{"__metadata__":{"a":1}}'), "must map names to strings"),
        (header_of(b'{"a":1}'), "unreadable header entry"),
        (tensor_at(0, 4, "I32", [-1], b"1234"), "unreadable"),
        (tensor_at(0, 4, "I32", [True], b"1234"), "unread"),
        (tensor_at(0, 4, "I32", [2], b"1234"), "takes 8 bytes"),
        (tensor_at(4, 0), "offsets span -4"),
        (tensor_at(0, 1, "Q9", data=b"1"), "dtype 'Q9'"),
        (tensor_at(1, 2, data=b"12"), "begins at byte"),
        (tensor_at(0, 1, data=b"12"), "end at byte"),
        (
            tensor_at(0, 1, shape=[2**62 - 1, 3], data=b"1"),
            "takes",
        ),
        (
            header_of(
                b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
                b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
                b"123",
            ),
            "begins at byte",
        ),
        (
            header_of(json.dumps({f"t{i}": 0 for i in range(5000)}).encode()),
            "names 5000 tensors, at most 4096",
        ),
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


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_bytes_change_no_other_error_escapes(make_trace, data):
    blob = bytearray(encode_trace(make_trace()))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_trace(bytes(blob))
    except UnreadableRecordError:
        return
