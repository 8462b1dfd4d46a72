"""A sampling field takes one new file and one line of the table: HTTP accepts and bounds it, lanes
and traces hold it, OpenAPI and the documentation show it."""

from __future__ import annotations

import json

import pytest

from oracles.one_line import run_in, with_addition

DEFINITION = """
from serving.fields.definition import IntegerColumn, RealColumn, declare

FIELD: float = declare(
    1.0,
    "Keeps the most typical tokens that together have this probability.",
    above=0,
    at_most=1,
    locations=(RealColumn(), IntegerColumn("IS_TYPICAL", lambda value, vocab_size: value < 1)),
    in_trace=True,
)
"""
LINE = '    typical_p: float = defined_in("serving.fields.typical_p")'

SERVE = """
import asyncio, json, sys
from pathlib import Path

import httpx

from buffer.backends import open_backend
from buffer.traces import TraceReader
from configs.schema import Settings
from serving.border.in_process import InProcess
from serving.build import build_service
from serving.engine.detokenize import Detokenizer
from serving.engine.lanes import Lanes
from serving.engine.sequence import Sequence
from serving.engine.vocabulary import Vocabulary
from serving.http.app import create_app
from serving.requests import Request
from serving.sampling import LANE_REALS, SamplingParams, documentation

target_dir, run_dir = sys.argv[1:]
settings = Settings.model_validate({
    "target": target_dir, "run_dir": run_dir, "device": "cpu", "drafter": {"max_draft": 1},
    "policy": {"kind": "fixed", "draft_k": 1}, "engine": {"max_model_len": 64, "max_batch": 2},
})
service = build_service(settings)
service.start()


async def ask():
    app = create_app(InProcess(service), settings)
    transport = httpx.ASGITransport(app=app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
    asked = []
    async with app.router.lifespan_context(app), client:
        for path, prompt in (
            ("/v1/completions", {"prompt": "hello"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ):
            for value in (0.25, 0, 1.5, "half"):
                body = {**prompt, "max_tokens": 4, "typical_p": value}
                answer = await client.post(path, json=body)
                asked.append((value, answer.status_code, answer.json().get("error")))
        schema = (await client.get("/openapi.json")).json()["components"]["schemas"]
    return asked, [schema[name]["properties"]["typical_p"] for name in (
        "CompletionRequest", "ChatRequest",
    )]


def lane_of(sampling):
    engine = service.engine
    lanes = Lanes(2, 4, 4, engine.programs.target)
    sequence = Sequence(
        request=Request("one", (5,), sampling), on_output=print, key=1,
        detokenizer=Detokenizer(Vocabulary(service.model.tokenizer)), eos_ids=frozenset(),
        tokens=[5],
    )
    sequence.lane = lanes.take()
    lanes.write([sequence])
    real = lanes.state.floats_3L[LANE_REALS.index("typical_p"), sequence.lane].item()
    return real, lanes.state.ints_FL[-1, sequence.lane].item()


asked, shown = asyncio.run(ask())
service.stop()
reader = TraceReader(open_backend(settings.buffer.url, Path(run_dir)))
traces = reader.read(10)
print(json.dumps({
    "asked": asked,
    "shown": shown,
    "default": SamplingParams().typical_p,
    "lanes": [lane_of(SamplingParams(typical_p=0.25)), lane_of(SamplingParams())],
    "traced": [trace.sampling.values["typical_p"] for trace in traces],
    "documented": "typical_p" in documentation(),
}))
"""


@pytest.fixture(scope="module")
def said(tiny_target_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    root = with_addition(
        folder,
        "serving/fields/typical_p.py",
        DEFINITION,
        "serving/sampling.py",
        LINE,
        after='defined_in("serving.fields.logit_bias")',
    )
    done = run_in(root, SERVE, str(tiny_target_dir), str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_http_takes_it_and_refuses_values_out_of_bounds_by_name(said):
    assert len(said["asked"]) == 8
    for value, status, error in said["asked"]:
        if value == 0.25:
            assert status == 200, error
        else:
            assert (status, error["param"]) == (400, "typical_p")
            assert error["message"].startswith("typical_p: Input should be ")


def test_openapi_shows_its_bounds_and_its_meaning_for_both_endpoints(said):
    assert len(said["shown"]) == 2
    for field in said["shown"]:
        number = field["anyOf"][0]
        assert (number["exclusiveMinimum"], number["maximum"]) == (0, 1)
        assert field["description"].startswith("Keeps the most typical tokens")


def test_the_documentation_lists_it(said):
    assert said["documented"]


def test_a_request_without_it_has_its_default(said):
    assert said["default"] == 1


def test_its_columns_of_the_lanes_hold_what_a_request_asks_for(said):
    assert said["lanes"] == [[0.25, 1], [1, 0]]


def test_the_trace_of_a_request_keeps_it(said):
    assert said["traced"] == [0.25, 0.25]
