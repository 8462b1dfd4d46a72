"""Which prompts are computed in a step, and which wait for others."""

from __future__ import annotations

import pytest

from oracles.engines import request_of
from oracles.support import tiny_tokenizer
from serving.engine.detokenize import Detokenizer
from serving.engine.pages import PagePool
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.engine.vocabulary import Vocabulary

HOLD_S = 1.0


@pytest.fixture
def scheduler():
    return Scheduler(PagePool(4000, prefix_cache=False), 4, 64, 4096, 4, prefill_hold_s=HOLD_S)


def admit(scheduler: Scheduler, count: int, num_prompt: int = 6, is_prefilled: bool = False):
    """So many requests, waiting for their prompts or decoding already."""
    admitted = []
    for number in range(count):
        request = request_of(f"{id(scheduler)}-{number}", [5] * num_prompt, 8)
        scheduler.waiting.append(
            Sequence(
                request=request,
                on_output=lambda _output: None,
                key=0,
                detokenizer=Detokenizer(Vocabulary(tiny_tokenizer())),
                eos_ids=frozenset(),
                tokens=list(request.prompt_ids),
            )
        )
        admitted += scheduler.admit()
    for sequence in admitted if is_prefilled else ():
        compute(sequence)
    return admitted


def compute(sequence: Sequence) -> None:
    """Its prompt is computed and its first token is there."""
    sequence.num_computed = len(sequence.tokens)
    sequence.tokens.append(7)


def test_a_prompt_waits_for_others_while_many_decode(scheduler):
    admit(scheduler, 32, is_prefilled=True)
    admit(scheduler, 1)

    assert scheduler.plan(0.0).chunks == ()
    admit(scheduler, 2)
    assert scheduler.plan(0.1).chunks == ()
    admit(scheduler, 1)

    plan = scheduler.plan(0.2)
    assert (len(plan.decode), len(plan.chunks)) == (32, 4)


def test_no_prompt_waits_longer_than_it_may(scheduler):
    admit(scheduler, 32, is_prefilled=True)
    (first,) = admit(scheduler, 1)

    assert scheduler.plan(5.0).chunks == ()
    assert scheduler.plan(5.0 + 0.9 * HOLD_S).chunks == ()
    (chunk,) = scheduler.plan(5.0 + HOLD_S).chunks

    assert chunk.sequence is first
    compute(first)
    admit(scheduler, 1)
    assert scheduler.plan(7.0).chunks == ()  # the next one has its time from its own begin


@pytest.mark.parametrize(
    ("num_decoding", "num_prompt"), [(0, 6), (15, 6), (63, 512)], ids=["alone", "few", "long"]
)
def test_nobody_waits_where_it_would_save_nothing(scheduler, num_decoding, num_prompt):
    admit(scheduler, num_decoding, is_prefilled=True)
    admit(scheduler, 1, num_prompt)

    assert len(scheduler.plan(0.0).chunks) == 1


def test_a_prompt_under_way_goes_on(scheduler):
    scheduler.prefill_chunk = 400
    admit(scheduler, 63, is_prefilled=True)
    (long,) = admit(scheduler, 1, 600)

    (chunk,) = scheduler.plan(0.0).chunks
    assert (chunk.start, chunk.end) == (0, 400)
    long.num_computed = 400
    (chunk,) = scheduler.plan(0.1).chunks
    assert (chunk.start, chunk.end) == (400, 600)


def test_a_wait_that_was_cancelled_does_not_count(scheduler):
    admit(scheduler, 32, is_prefilled=True)
    (gone,) = admit(scheduler, 1)
    assert scheduler.plan(0.0).chunks == ()
    scheduler.remove(gone)
    scheduler.plan(0.5)
    admit(scheduler, 1)

    assert scheduler.plan(HOLD_S).chunks == ()
    assert len(scheduler.plan(2 * HOLD_S).chunks) == 1
