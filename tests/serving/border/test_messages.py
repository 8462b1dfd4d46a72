"""Messages are read as they were sent, and nothing else is read."""

from __future__ import annotations

import msgspec
import pytest

from serving.border.messages import (
    Cancel,
    FromEngine,
    FromHttp,
    Outputs,
    Submit,
    error_of,
    frame,
    refused,
)
from serving.framing import Frames, ProtocolError
from serving.requests import (
    DrainingError,
    Output,
    QueueFullError,
    Request,
    SamplingParams,
    SpeculationStats,
    TokenLogprob,
)

SAMPLING = SamplingParams(
    temperature=0.7,
    top_k=None,
    seed=-(2**63),
    stop=("\n\n", "é"),
    stop_token_ids=(1, 2),
    logprobs=2,
    logit_bias=((7, -1.5),),
    cache_salt="salt",
)
REQUESTS = [
    Request("a", (1, 2, 250_000), SAMPLING, "me", max_draft=0, capture=False),
    Request("b", (3,), SamplingParams(), drafters=frozenset({"one", "two"})),
]
OUTPUT = Output(
    request_id="a",
    text="né\U0001f600",
    token_ids=(5, 6),
    logprobs=(TokenLogprob(5, -0.5, ((5, -0.5), (9, float("-inf")))), TokenLogprob(6, -1.0, ())),
    finish_reason="stop",
    stats=SpeculationStats(1, 2, 3, 1),
    num_prompt_tokens=3,
    num_cached_tokens=0,
)


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(size):
    sent = [Submit(1, REQUESTS), Cancel(["a"]), Submit(2, REQUESTS[1:])]
    data = b"".join(map(frame, sent))
    frames: Frames[FromHttp] = Frames(FromHttp)
    came = [m for at in range(0, len(data), size) for m in frames.feed(data[at : at + size])]
    assert came == sent


def test_outputs_come_out_as_they_went_in():
    (came,) = Frames(FromEngine).feed(frame(Outputs([OUTPUT, Output.engine_gone("b")])))
    assert came == Outputs([OUTPUT, Output.engine_gone("b")])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(["Submit", 1, [{"id": "a"}]], id="fields are missing"),
        pytest.param(["Submit", "1", []], id="wrong type"),
        pytest.param(["Cancel", ["a"], 1], id="a field too many"),
        pytest.param(["Outputs", []], id="a message of the other side"),
        pytest.param({"Cancel": ["a"]}, id="wrong shape"),
    ],
)
def test_what_is_no_message_of_http_is_refused(value):
    data = msgspec.msgpack.encode(value)
    with pytest.raises(ProtocolError):
        list(Frames(FromHttp).feed(len(data).to_bytes(4, "big") + data))


def test_bytes_that_are_no_messagepack_are_refused():
    with pytest.raises(ProtocolError):
        list(Frames(FromHttp).feed(b"\0\0\0\1\xc1"))


def test_a_message_that_announces_too_much_is_refused_before_it_comes():
    with pytest.raises(ProtocolError, match="101 bytes, at most 100"):
        list(Frames(FromHttp, most_bytes=100).feed((101).to_bytes(4, "big")))


@pytest.mark.parametrize("kind", [QueueFullError, DrainingError, ValueError])
def test_a_refusal_is_the_same_error_on_the_other_side(kind):
    error = error_of(refused(1, kind("why")))
    assert (type(error), str(error)) == (kind, "why")
