"""What outputs put off is done once for all outputs of a step, and always done."""

from __future__ import annotations

import threading

import pytest
import torch

from oracles.engines import make_engine, random_model, request_of
from serving.engine.handover import Handover
from serving.requests import ENGINE_GONE, Output

NUM_REQUESTS = 3


class Gathering:
    """Takes outputs in batches, as the border does."""

    def __init__(self, engine) -> None:
        self.batches: list[list[Output]] = []
        self.launches_at: list[int] = []
        """Rounds that had been launched when each batch was handed over."""
        self._engine, self._gathered, self._num_launched = engine, [], 0
        self._launch = engine.programs.rounds.launch
        engine.programs.rounds.launch = self._counted

    def take(self, output: Output) -> None:
        if not self._gathered:
            self._engine.inbox.handover.put_off(self._hand_over)
        self._gathered.append(output)

    def endings(self) -> dict[str, Output]:
        return {o.request_id: o for batch in self.batches for o in batch if o.finish_reason}

    def _hand_over(self) -> None:
        self.batches.append(self._gathered)
        self.launches_at.append(self._num_launched)
        self._gathered = []

    def _counted(self, *arguments):
        self._num_launched += 1
        return self._launch(*arguments)


def submitted(overlaps: bool, max_tokens: int):
    """An engine with requests, and who takes their outputs."""
    engine = make_engine(random_model("qwen3"), overlaps=overlaps)
    gathering = Gathering(engine)
    for number in range(NUM_REQUESTS):
        request = request_of(str(number), [5, 6, 7 + number], max_tokens, max_draft=0)
        engine.inbox.submit(request, gathering.take)
    return engine, gathering


@pytest.mark.parametrize("overlaps", [False, True])
def test_outputs_of_a_step_are_handed_over_together_and_none_is_left(overlaps):
    engine, gathering = submitted(overlaps, max_tokens=6)
    with torch.inference_mode():
        while engine.step():
            pass
    tokens = {o.request_id: 0 for batch in gathering.batches for o in batch}
    for batch in gathering.batches:
        assert len({o.request_id for o in batch}) == len(batch)
        for output in batch:
            tokens[output.request_id] += len(output.token_ids)
    assert tokens == {str(number): 6 for number in range(NUM_REQUESTS)}
    assert gathering.endings().keys() == tokens.keys()
    assert [len(batch) for batch in gathering.batches].count(NUM_REQUESTS) >= 5


def test_where_rounds_overlap_outputs_wait_until_the_next_round_is_launched():
    engine, gathering = submitted(True, max_tokens=6)
    with torch.inference_mode():
        while engine.step():
            pass
    # Tokens of the prompts; of round 1, which was committed behind the launch of round 2; of rounds
    # 2 to 5, the last.
    assert gathering.launches_at == [1, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("ending", ["cancelled", "failed", "stopped", "gone"])
def test_however_requests_end_the_end_is_handed_over(overlaps, ending, monkeypatch, caplog):
    engine, gathering = submitted(overlaps, max_tokens=200)
    right, ended = gathering._hand_over, threading.Event()

    def lost(*_: object) -> bool:
        raise RuntimeError("device is lost")

    endings = {
        "cancelled": engine.inbox.cancel_all,
        "stopped": engine.inbox.close,
        "failed": lambda: monkeypatch.setattr(engine.programs.rounds, "launch", lost),
        "gone": lambda: monkeypatch.setattr(engine, "step", lost),
    }

    def hand_over() -> None:
        right()
        if len(gathering.batches) == 2:
            endings[ending]()
        if len(gathering.endings()) == NUM_REQUESTS:
            ended.set()

    monkeypatch.setattr(gathering, "_hand_over", hand_over)
    if ending == "gone":
        monkeypatch.setattr(engine, "_fail_all", lost)
    engine.start()
    assert ended.wait(60)
    engine.stop()
    reasons = {o.finish_reason for o in gathering.endings().values()}
    assert reasons == {"error" if ending in ("failed", "gone") else "cancelled"}
    if ending == "gone":
        assert {o.error_code for o in gathering.endings().values()} == {ENGINE_GONE}


def test_clients_hear_of_a_failed_step_before_the_engine_waits_for_its_device(monkeypatch):
    engine, gathering = submitted(True, max_tokens=6)
    told: list[int] = []

    def wait() -> None:
        told.append(len(gathering.endings()))

    monkeypatch.setattr(engine.programs.ring, "synchronise", wait)
    with torch.inference_mode():
        engine.step()
        engine._fail_all()
    assert told == [NUM_REQUESTS]


def test_a_call_that_fails_takes_no_other_with_it():
    handover, done = Handover(), list[int]()

    def fails() -> None:
        raise RuntimeError("fails")

    handover.put_off(lambda: done.append(1))
    handover.put_off(fails)
    handover.put_off(lambda: done.append(2))
    with pytest.raises(RuntimeError):
        handover.run()
    handover.run()
    assert sorted(done) == [1, 2]
    handover.run()
    assert sorted(done) == [1, 2]
