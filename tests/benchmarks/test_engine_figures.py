"""The figures that benchmarks compute, and the harness that drives engines for them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks.engine.graphs import idle_of
from benchmarks.engine.swaps import slowest_waits, step_times
from benchmarks.harness.engines import declare_computed
from benchmarks.harness.loops import Batch, random_prompts
from benchmarks.harness.results import Report, Row, write_rows
from oracles.engines import make_engine, random_model


def kernel(begin, length, launch):
    return {"cat": "kernel", "ts": begin, "dur": length, "args": {"correlation": launch}}


def test_pauses_within_a_graph_are_idle_for_kernels_and_busy_for_launches():
    graphs = [kernel(0, 3, 1), kernel(5, 3, 1), kernel(10, 5, 2), kernel(12, 8, 2)]
    host = {"cat": "cuda_runtime", "ts": 0, "dur": 100}

    idle = idle_of([*graphs, host])

    assert idle.between_launches == pytest.approx(2 / 20)
    assert idle.no_kernel == pytest.approx(4 / 20)
    assert idle.num_launches == 2


def test_a_trace_without_the_device_says_nothing():
    assert idle_of([{"cat": "cuda_runtime", "ts": 0, "dur": 100}]) is None


@torch.inference_mode()
def test_declared_contexts_are_found_and_each_has_its_own_pages():
    engine = make_engine(random_model("qwen3"))
    prompts = random_prompts(3, 50, engine.inbox.limits.vocab_size)

    declare_computed(engine, prompts)
    batch = Batch(engine, prompts, max_tokens=20)
    batch.begin()

    running = engine.scheduler.running
    assert engine.figures().cached_prompt_tokens == 3 * 48
    assert len({page for s in running for page in s.pages}) == sum(len(s.pages) for s in running)
    batch.end()
    assert engine.inbox.num_inflight() == 0


def test_the_longest_wait_is_a_multiple_of_its_requests_median():
    news = [[0, 1, 2, 3, 5.5, 6.5], [0, 2, 4, 6, 8], [100]]

    found = slowest_waits(news, 0, 50)

    assert found["slowest_wait_over_median"] == 2.5
    assert found["median_wait_ms"] == 1500
    assert found["requests_slowed_by_more_than_one_step"] == 1


def test_waits_that_grow_with_the_contexts_are_no_slow_ones():
    """Waits grow from 1 to 3; then one in the middle is three times as long as its neighbours."""
    stamps = list(itertools.accumulate(1 + n / 500 for n in range(1000)))
    assert slowest_waits([stamps], 0, 1e6)["slowest_wait_over_median"] < 1.2

    late = [stamp + 4 * (n >= 500) for n, stamp in enumerate(stamps)]
    found = slowest_waits([stamps, late], 0, 1e6)

    assert found["slowest_wait_over_median"] == pytest.approx(3, rel=0.1)
    assert found["requests_slowed_by_more_than_one_step"] == 1


def test_steps_with_and_without_a_swap_are_told_apart_within_the_window():
    begun = [0.0, 1.0, 2.0, 4.0, 5.0]

    found = step_times(begun, swapped=[0, 2], begin=0.5, end=4.5)

    assert (found["steps_with_swap"], found["steps_without_swap"]) == (1, 1)
    assert (found["step_with_swap_ms"], found["step_without_swap_ms"]) == (2000, 1000)


def test_a_row_that_fails_or_does_not_fit_leaves_the_others(tmp_path):
    out = tmp_path / "result.json"
    report = Report(out, budget_s=100, about={"dtype": "float32"})

    def fail():
        raise ValueError("no room")

    report.attempt("decode", {"batch": 1}, 1, fail)
    report.attempt("decode", {"batch": 2}, 1000, lambda: {"step_ms": 1.0})
    report.attempt("decode", {"batch": 3}, 1, lambda: {"step_ms": 2.0})

    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["error"] == "ValueError: no room"
    assert "skipped" in rows[1] and "step_ms" not in rows[1]
    assert rows[2]["step_ms"] == 2.0


def test_rows_of_other_parts_are_kept_and_say_where_they_were_measured(tmp_path):
    first = Report(tmp_path / "result.json", budget_s=100, about={})
    first.add("decode", {"step_ms": 1.0})
    first.add("swaps", {"num_swaps": 3})
    former = json.loads((tmp_path / "result.json").read_text())
    elsewhere = {**former, "machine": {"commit": "another"}}

    reports = [Report(tmp_path / "result.json", budget_s=100, about={}) for _ in range(2)]
    for report, result in zip(reports, (former, elsewhere), strict=True):
        report.keep(result, without=["swaps", "capture"])

    assert [row["part"] for report in reports for row in report.rows] == ["decode", "decode"]
    assert "machine" not in reports[0].rows[0]
    assert reports[1].rows[0]["machine"] == {"commit": "another"}


def test_rows_of_another_source_stay_and_those_of_the_same_are_replaced(tmp_path):
    plain = Row("tiny, plain", "tokens per second", 12.5, "at least 10", True)
    drafted = Row("tiny, K = 4", "tokens per second", 20.0, None, None)

    write_rows("speed", [plain], "python -m one", tmp_path)
    write_rows("speed", [drafted], "python -m other", tmp_path)
    out = write_rows("speed", [drafted], "python -m one", tmp_path)

    rows = json.loads(out.read_text())
    assert out == tmp_path / "rows" / "speed.json"
    assert [(row["row"], row["source"]) for row in rows] == [
        ("tiny, K = 4", "python -m other"),
        ("tiny, K = 4", "python -m one"),
    ]
    assert set(rows[0]) == {
        "row", "measure", "value", "goal", "holds", "hardware", "commit", "source",
    }  # fmt: skip
