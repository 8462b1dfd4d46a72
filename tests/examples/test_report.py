"""The demo's report is true to its recording, in figures, words, colours and picture."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.records import Acceptance
from examples import picture
from examples import report as reporting
from examples.arms import ALL_ARMS
from examples.recording import Answer, Goals, Learning, Recording, VersionChange, learning_of
from examples.report import (
    Check,
    build_report,
    checks,
    headline,
    learning_line,
    speeds,
    speedup_error,
)
from tests.examples.sample import TOKENS, acceptance_of, sample_recording


@pytest.fixture(scope="module")
def recording() -> Recording:
    return sample_recording()


def failed(recording: Recording) -> list[str]:
    return [check.name for check in checks(build_report(recording)) if not check.passed]


def test_every_demanded_key_is_there(recording: Recording):
    report = build_report(recording)

    speeds = {f"{arm}_tokens_per_s" for arm in ALL_ARMS}
    assert "index_tokens_per_s" in speeds and "drafter_alone_tuned_tokens_per_s" in speeds
    speeds |= {"speedup_vs_plain", "speedup_vs_static", "speedup_vs_index"}
    counts = {"swaps", "rollbacks", "requests", "failed_requests", "mismatched_outputs", "seconds"}
    assert speeds | counts <= set(report)
    assert [phase["name"] for phase in report["phases"]] == ["python", "c", "docs", "python-again"]
    assert all(speeds | {"tokens_per_step"} <= set(phase) for phase in report["phases"])


def test_top_level_speeds_are_over_the_shifted_phases_together(recording: Recording):
    report = build_report(recording)

    shifted = [r for r in recording.replays if r.domain in ("c", "docs") and r.arm == "tuned"]
    expected = len(shifted) * TOKENS / sum(replay.share_s for replay in shifted)
    assert report["tuned_tokens_per_s"] == pytest.approx(expected)
    assert report["speedup_vs_plain"] == pytest.approx(expected / 150)


def test_first_phase_reports_the_drafter_of_its_own_end(recording: Recording):
    first, *_, last = build_report(recording)["phases"]

    assert first["tokens_per_step"] == first["static_tokens_per_step"]
    assert first["tokens_per_step_version"] == recording.static_version
    assert last["tokens_per_step"] == last["tuned_tokens_per_step"]


def test_ratio_to_first_compares_weights_on_the_same_prompts(recording: Recording):
    last = build_report(recording)["phases"][-1]

    python = [r for r in recording.replays if r.domain == "python"]
    newest, former = (
        reporting.tokens_per_step(r for r in python if r.arm == f"drafter_alone_{which}")
        for which in ("tuned", "static")
    )
    assert last["tokens_per_step_ratio_to_first"] == pytest.approx(newest / former)
    assert last["tokens_per_step_ratio_to_first"] < 1


def test_speed_is_of_the_servers_time_and_not_of_each_clients(recording: Recording):
    """Eight requests at a time each wait long and take an eighth of the turn."""
    together = tuple(replace(r, request_s=8 * r.share_s) for r in recording.replays)

    report = build_report(replace(recording, replays=together, replay_clients=8))

    assert report["tuned_tokens_per_s"] == build_report(recording)["tuned_tokens_per_s"]


def test_learning_is_earned_back_by_what_the_weights_save(recording: Recording):
    report = build_report(recording)
    shifted = [r for r in recording.replays if r.domain in recording.shifted]
    index, tuned = ([r.share_s for r in shifted if r.arm == arm] for arm in ("index", "tuned"))
    saved_s = sum(index) / len(index) - sum(tuned) / len(tuned)

    assert report["learning_seconds"] == 60.0
    assert report["earned_back_after_requests"] == pytest.approx(60 / saved_s, abs=1)
    slower = with_speed(recording, "tuned", 0.5)
    assert build_report(slower)["earned_back_after_requests"] is None
    assert "no number of requests" in reporting.learning_line(build_report(slower))


def test_a_busy_machine_is_named_beside_the_figures(recording: Recording):
    busy = replace(recording, load_before=3.0)

    assert reporting.busy_line(build_report(recording)) == ""
    assert "load 3.0 on 2 cores" in reporting.busy_line(build_report(busy))
    assert "these speeds mean little" in page_of(busy)


def test_learning_is_read_from_the_trainers_journal(tmp_path: Path):
    events = [
        {"event": "started", "version": 0},
        {"event": "update", "seconds": 0.5, "rows": 100, "updates": 3},
        {"event": "update", "seconds": 0.25, "rows": 50, "updates": 1},
        {"event": "gate", "seconds": 1.0},
        {"event": "checkpoint", "seconds": 9.0},
    ]
    journal = tmp_path / "log.jsonl"
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))

    assert learning_of(journal, "GPU") == Learning("GPU", 1.75, 4, 150)
    assert learning_of(tmp_path / "none", "CPU") == Learning("CPU", 0, 0, 0)


def test_a_prompt_answered_differently_by_one_arm_is_one_mismatch(recording: Recording):
    spoiled = list(recording.replays)
    spoiled[5] = replace(spoiled[5], token_ids=(*spoiled[5].token_ids[:-1], 999))

    assert build_report(recording)["mismatched_outputs"] == 0
    assert build_report(replace(recording, replays=tuple(spoiled)))["mismatched_outputs"] == 1


def test_requests_count_live_replayed_warming_and_failed_ones(recording: Recording):
    report = build_report(replace(recording, failed_requests=3))

    expected = len(recording.answers) + len(recording.replays) + recording.warmup_requests + 3
    assert report["requests"] == expected


def test_good_recording_passes_and_each_fault_fails_by_name(recording: Recording):
    assert failed(recording) == []
    assert failed(replace(recording, swaps=4)) == ["swaps"]
    assert failed(replace(recording, failed_requests=1)) == ["failed requests"]
    assert failed(replace(recording, seconds=601.0)) == ["seconds"]
    high = Goals(over_plain=9.0, over_static=1.1, seconds=600.0)
    assert failed(replace(recording, goals=high)) == ["shifted phases: speed over plain"]


def test_slow_drafter_fails_on_its_phase_and_on_the_whole(recording: Recording):
    slow = tuple(
        replace(r, share_s=2 * r.share_s) if (r.domain, r.arm) == ("c", "tuned") else r
        for r in recording.replays
    )

    names = failed(replace(recording, replays=slow))

    assert "c: speed over the best arm" in names
    assert "shifted phases: speed over static" in names
    assert "docs: speed over the best arm" not in names


def test_an_arm_that_is_faster_than_tuned_is_the_best_one(recording: Recording):
    assert "c: speed over the best arm" in failed(with_speed(recording, "index", 1.4))
    alone = with_speed(recording, "drafter_alone_static", 9.0)
    assert failed(alone) == [], "the drafter alone is beside the arms"


def test_a_figure_that_was_not_measured_fails():
    assert not Check("speed", None, 0.0, "at least").passed
    assert not Check("speed", None, 9.0, "at most").passed


def test_median_speedup_pairs_prompts_with_themselves(recording: Recording):
    replays = [r for r in recording.replays if r.domain == "c"]

    assert reporting.median_speedup(replays, "plain", "plain") == 1.0
    assert reporting.median_speedup(replays, "tuned", "plain") == pytest.approx(1.98)
    assert reporting.median_speedup([], "tuned", "plain") is None


def test_unanswered_phase_has_no_figures_instead_of_zeros(recording: Recording):
    silent = replace(recording, answers=(), replays=())

    phase = build_report(silent)["phases"][1]

    assert phase["plain_tokens_per_s"] is None
    assert phase["tokens_per_step"] is None
    assert phase["live_tokens_per_step_last_quarter"] is None
    assert "<svg" in picture.render_html(silent, build_report(silent))


def answered(versions: list[int]) -> list[Answer]:
    spent = acceptance_of(3.0)
    return [Answer("c", float(i), 96, spent, v, v, "c") for i, v in enumerate(versions)]


def with_speed(recording: Recording, arm: str, factor: float) -> Recording:
    """The recording with one arm faster by ``factor``."""
    replays = tuple(
        replace(r, share_s=r.share_s / factor) if r.arm == arm else r for r in recording.replays
    )
    return replace(recording, replays=replays)


def page_of(recording: Recording) -> str:
    return picture.render_html(recording, build_report(recording))


def test_headline_and_colours_of_a_drafter_that_learned(recording: Recording):
    report = build_report(recording)

    assert report["speedup_vs_static"] > report["speedup_vs_index"] > 1
    assert headline(report) == (
        f"Learning paid: {report['speedup_vs_static']:.2f} times as fast as the frozen server, "
        f"{report['speedup_vs_index']:.2f} times by the weights (± 0.10 and 0.04)",
        "good",
    )
    assert page_of(recording).count('<b class="good">') == 5  # three speedups and no faults
    assert '<b class="bad">' not in page_of(recording)


@pytest.mark.parametrize(
    ("arm", "factor", "expected"),
    [
        ("static", 1.6, r"Learning did not pay: 0\.9\d times as fast as the frozen server"),
        ("index", 1.4, r"Learning did not pay: 0\.9\d times as fast as the frozen weights"),
        ("plain", 9.0, r"Drafting did not pay: 0\.2\d times plain decoding"),
    ],
)
def test_a_demo_that_lost_says_so_and_not_in_green(
    recording: Recording, arm: str, factor: float, expected: str
):
    lost = with_speed(recording, arm, factor)

    text, mood = headline(build_report(lost))
    assert re.fullmatch(expected, text) and mood == "bad"
    page = page_of(lost)
    assert f'<h1 class="bad">{text}</h1>' in page
    assert page.count('<b class="good">') == 4  # the other speedups and no faults
    assert page.count('<b class="bad">') == 1
    assert "Learning paid" not in page


def test_a_speedup_shown_as_one_is_no_gain(recording: Recording):
    report = {**build_report(recording), "speedup_vs_index": 1.004}

    assert headline(report) == (
        "Learning changed nothing: the newest weights are as fast as the frozen ones",
        "neutral",
    )


def scattered(recording: Recording, share: float, seed: int = 0) -> Recording:
    """The recording with times of turns that differ by chance."""
    rng = random.Random(seed)
    return replace(
        recording,
        replays=tuple(
            replace(r, share_s=r.share_s * math.exp(rng.gauss(0, share))) for r in recording.replays
        ),
    )


def test_a_gain_that_chance_may_have_made_is_not_called_one():
    recording = scattered(with_speed(sample_recording(prompts=12), "tuned", 0.82), 0.3)
    report = build_report(recording)

    assert report["speedup_vs_static"] > 1.05 and report["speedup_vs_index"] > 1.01
    text, mood = headline(report)
    assert text.startswith("Not shown that learning paid: 1.") and mood == "neutral"
    assert "Learning paid" not in page_of(recording)


def test_of_several_runs_each_must_have_gained(recording: Recording):
    report = build_report(recording)
    runs = [{"speedup_vs_static": 1.4, "speedup_vs_index": speed} for speed in (1.2, 1.3)]
    assert headline({**report, "runs": runs})[1] == "good"

    runs[0]["speedup_vs_index"] = 1.0
    assert headline({**report, "runs": runs})[1] == "neutral"


def test_without_a_version_nothing_was_learned(recording: Recording):
    same = replace(recording, newest_version=recording.static_version)
    report = build_report(same)

    assert headline(report) == (
        "Nothing was learned: no version came after the first phase",
        "neutral",
    )
    assert report["earned_back_after_requests"] is None
    idle = replace(same, learning=Learning("CPU", 0.0, 0, 0))
    assert learning_line(build_report(idle)) == "The trainer made no update."


def test_the_error_of_a_speedup_is_the_scatter_of_repeated_replays():
    recording = sample_recording(prompts=20)
    repeated = [
        [r for r in scattered(recording, 0.2, seed).replays if r.domain == "c"]
        for seed in range(100)
    ]
    speedups = [speeds(replays)["speedup_vs_index"] for replays in repeated]
    errors = [speedup_error(replays, "tuned", "index") for replays in repeated]

    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(speedups), rel=0.2)


def test_prompts_of_one_turn_are_one_measurement():
    single = scattered(sample_recording(prompts=20), 0.2).replays
    doubled = [replace(r, prompt=r.prompt + 100 * n) for n in (0, 1) for r in single]

    error = speedup_error(single, "tuned", "index")
    assert speedup_error(doubled, "tuned", "index") == pytest.approx(error)
    assert speedup_error([r for r in single if r.turn == 0][:6], "tuned", "index") is None


def test_failed_requests_are_red(recording: Recording):
    page = page_of(replace(recording, failed_requests=2))

    assert '<b class="bad">2</b>failed requests' in page


def test_picture_marks_the_recorded_rollbacks_and_no_others(recording: Recording):
    """Answers of an older version finish after newer ones without a rollback: slow requests."""
    versions = [0, 1, 0, 0, 0]
    quiet = replace(recording, answers=tuple(answered(versions)), changes=())
    back = replace(quiet, changes=(VersionChange(1.5, 0, True),))

    red = picture.ROLLBACK_COLOUR
    assert red not in picture.draw(quiet, build_report(quiet))
    assert "rolled back" not in picture.draw(quiet, build_report(quiet))
    assert red in picture.draw(back, build_report(back))
    assert "rolled back" in picture.draw(back, build_report(back))


def test_a_change_stands_between_the_requests_that_finished_around_it(recording: Recording):
    little = replace(recording, answers=tuple(answered([0, 0, 1, 1])))

    assert [picture.num_answered(little, at_s) for at_s in (-1.0, 1.5, 9.0)] == [0, 2, 4]


def test_picture_shows_the_static_level_of_the_same_load_only(recording: Recording):
    def num_levels(shown: Recording) -> int:
        pieces = picture.draw(shown, build_report(shown)).split("<g id=")
        return sum(piece.startswith('"LineCollection') for piece in pieces)

    assert num_levels(recording) == 4, "one in each phase, for tokens_per_step"
    assert num_levels(replace(recording, replay_clients=recording.num_clients)) == 8


def test_curves_restart_at_each_phase(recording: Recording):
    curves = picture.rolling(recording, picture.window_tokens_per_step)

    assert [curve[0][0] for curve in curves] == [8, 68, 128, 188]
    assert curves[1][0][1] < 2.5 < curves[0][-1][1]


def test_throughput_counts_all_clients(recording: Recording):
    answers = (*answered([0] * 8),)
    span = replace(recording.phases[1], started_s=-1.0, ended_s=7.0)
    little = replace(recording, phases=(span,), answers=answers)

    [curve] = picture.rolling(little, picture.window_tokens_per_s)

    assert curve == [(8, 8 * 96 / 8)]


def test_files_are_written_and_can_be_made_again_from_the_recording(
    recording: Recording, tmp_path: Path
):
    report = picture.write(tmp_path, recording)

    again = Recording.from_json((tmp_path / "recording.json").read_text())
    assert again == recording
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)=|url\([^#]|@import|<script", page.replace('href="#', ""))
    assert (tmp_path / "report.svg").read_text().startswith("<svg")


def test_machine_texts_are_escaped(recording: Recording):
    spoiled = replace(recording, machine={"hardware": {"cpu": "<script>", "cores": 2}})

    assert "<script>" not in picture.render_html(spoiled, build_report(spoiled))


def test_tokens_per_step_counts_the_targets_own_token():
    assert reporting.tokens_per_step(answered([0])) == pytest.approx(3.0)
    assert Acceptance(4, 8, 8).tokens_per_step == 3.0
