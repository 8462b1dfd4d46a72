"""What a step with new requests uploads, and the lanes that its program writes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from oracles.engines import make_engine, random_model, request_of, run
from serving.engine.prompt_inputs import FIRST, IDS, LANE, ROW
from specops.lanes import Field, Input


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


def requests():
    """More than a program writes lanes for, each with sampling of its own."""
    kinds = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"logit_bias": ((7, 4.0),)},
        {"top_k": 3, "seed": 1},
    ]
    return [
        request_of(str(n), [3 + n, *range(n, n + 5)], 6 + n, **kinds[n % 4], ignore_eos=True)
        for n in range(13)
    ]


@pytest.mark.parametrize("overlaps", [True, False])
def test_requests_that_begin_at_once_are_answered_as_each_alone(model, overlaps):
    shape = {"max_batch": 16, "prefill_chunk": 128, "overlaps": overlaps}
    engine = make_engine(model, **shape)
    together = run(engine, requests())
    alone = make_engine(model, **shape)
    for one in requests():
        expected = run(alone, [one])[one.id].token_ids
        assert together[one.id].token_ids == expected, one.id


def test_what_was_uploaded_is_where_the_programs_read_it(model):
    engine = make_engine(model, max_batch=3)
    inputs, lanes = engine.programs.prefill._inputs, engine.programs.lanes
    block = [2, 16, 5, *range(100, 100 + inputs.blocks.shape[1] - IDS)]

    inputs.upload(2, [block], [[2, 0, 4]])
    inputs.write_lanes()

    assert inputs.blocks[0].tolist() == block
    assert inputs.blocks[1, LANE] == lanes.padding and not inputs.blocks[1, FIRST:].any()
    assert inputs.ends[0].tolist() == [2, 0, 4] and inputs.ends.shape[1] == ROW + 1
    assert inputs.ends[1:, Input.LANE].tolist() == [lanes.padding] * 2
    assert not lanes.ints[:, :3].any(), "no request was fresh"
    own = lanes.ints[:, lanes.padding]
    assert own[Field.LENGTH] == own[Field.LIMIT] == 1 and own.sum() == 2


def test_one_copy_uploads_all(model, monkeypatch):
    engine = make_engine(model, max_batch=3, suffix=False)
    copies = []
    copy = torch.Tensor.copy_

    def counted(to, source, non_blocking=False):
        if non_blocking:
            copies.append(to)
        return copy(to, source, non_blocking=non_blocking)

    prefill = engine.programs.prefill
    run(engine, [request_of("first", [9, 8, 7], 4)])  # makes the program
    engine.inbox.submit(request_of("a", [1, 2, 3], 4), lambda _output: None)
    compute = prefill._compute
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    program = lambda size: copies.append("program") or compute(size)  # noqa: E731
    monkeypatch.setattr(prefill, "_programs", {1: partial(program, 1)})
    with torch.inference_mode():
        engine.step()

    before = copies[: copies.index("program")]
    assert len(before) == 1
