"""The demo's plan, its folder and what it prints. Its figures are tested in test_report.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import typer
from rich.console import Console

from examples.arms import ALL_ARMS
from examples.clients import replay_rounds
from examples.demo import (
    gather_texts,
    how_to_look,
    is_enough,
    main,
    settings_of,
    version_changes,
    why_not_written,
)
from examples.live import Now, line, sparkline, summary
from examples.plan import DemoSettings, real_settings, with_prompts, with_requests
from examples.recording import Recording, VersionChange
from examples.report import build_report
from examples.run_folder import MARKER, DemoError, own_folder
from examples.texts import Kept, Phase
from examples.traffic.prompts import Prompt, PromptError, asked, write_prompts
from tests.examples.sample import sample_answers, sample_recording


def test_each_arm_answers_each_prompt_once():
    rounds = replay_rounds(num_prompts=10, block=4)

    met = Counter((turn.arm, i) for turns in rounds for turn in turns for i in turn.prompts)
    assert met == Counter({(arm, i): 1 for arm in ALL_ARMS for i in range(10)})


def test_a_round_is_the_same_prompts_by_all_arms_in_rotating_order():
    rounds = replay_rounds(num_prompts=24, block=4)

    assert all(len({turn.prompts for turn in turns}) == 1 for turns in rounds)
    assert [turns[0].arm for turns in rounds] == list(ALL_ARMS)


@pytest.mark.parametrize(
    ("elapsed_s", "num_answers", "has_caught_up", "expected"),
    [
        pytest.param(90, 0, False, True, id="time is over"),
        pytest.param(50, 100, True, True, id="enough requests, trainer has caught up"),
        pytest.param(50, 100, False, False, id="new versions keep coming"),
        pytest.param(50, 99, True, False, id="too few requests"),
    ],
)
def test_end_of_a_phase(elapsed_s: float, num_answers: int, has_caught_up: bool, expected: bool):
    phase = Phase("c", "c", True, seconds=90, enough_requests=100)

    assert is_enough(phase, elapsed_s, num_answers, has_caught_up) is expected


def test_default_plan_fits_ten_minutes():
    settings = DemoSettings()

    traffic_s = sum(phase.seconds for phase in settings.phases)
    replay_s = settings.replay_s * len({phase.domain for phase in settings.phases})
    assert traffic_s + replay_s <= 500
    assert [phase.name for phase in settings.phases] == ["python", "c", "docs", "python-again"]


def test_prompts_of_the_replay_are_not_in_the_traffic():
    phases = tuple(Phase(name, "python", False, 1, 1) for name in ("python", "python-again"))
    settings = DemoSettings(phases=phases, max_requests=20, kept=Kept(6, 2))

    texts = gather_texts(settings)

    live = [*texts.live["python"], *texts.live["python-again"]]
    kept = [*texts.held_out["python"], *texts.warmup["python"]]
    assert len(live) == 40 and len(texts.held_out["python"]) == 6
    assert len(set(live) | set(kept)) == len(live) + len(kept)


def test_the_real_targets_plan_takes_five_minutes_and_comes_back_to_its_first_domain():
    settings = real_settings()

    traffic_s = sum(phase.seconds for phase in settings.phases)
    assert traffic_s + settings.replay_s * len(settings.phases) <= 300
    assert len({phase.domain for phase in settings.phases}) == 4
    assert settings.phases[-1].domain == settings.phases[0].domain


def file_of(folder: Path, **counts: int) -> Path:
    path = folder / "mine.jsonl"
    write_prompts(path, (asked(d, f"{d} {i}") for d, n in counts.items() for i in range(n)))
    return path


def test_a_file_of_prompts_brings_its_own_phases(tmp_path: Path):
    settings = DemoSettings(kept=Kept(4, 1), max_requests=50)
    settings = with_prompts(settings, file_of(tmp_path, mail=11, law=9))

    texts = gather_texts(settings)

    assert [(p.name, p.shifted) for p in settings.phases] == [
        ("mail", False),
        ("law", True),
        ("mail-again", False),
    ]
    assert {name: len(prompts) for name, prompts in texts.live.items()} == {
        "mail": 3,
        "mail-again": 3,
        "law": 4,
    }
    assert all(prompt.messages for prompt in texts.held_out["law"])


def test_a_stream_ends_with_its_prompts_and_comes_back_to_its_first_domain():
    settings = with_requests(DemoSettings(kept=Kept(4, 1)), 120, "both")

    texts = gather_texts(settings)

    names = ["python", "c", "docs", "mixed", "python-again"]
    assert [phase.name for phase in settings.phases] == names
    assert {name: len(prompts) for name, prompts in texts.live.items()} == dict.fromkeys(names, 24)
    mixed = [prompt.domain for prompt in texts.live["mixed"]]
    assert {domain: mixed.count(domain) for domain in mixed} == {"python": 8, "c": 8, "docs": 8}
    assert mixed != sorted(mixed, key=["python", "c", "docs"].index)
    assert not is_enough(settings.phases[0], elapsed_s=600.0, num_answers=23, has_caught_up=True)
    sent = [prompt for name in names for prompt in texts.live[name]]
    kept = [prompt for prompts in texts.held_out.values() for prompt in prompts]
    assert len(set(sent) | set(kept)) == 120 + 12


def test_a_mixed_stream_is_one_phase_without_replays():
    settings = with_requests(DemoSettings(), 30, "mixed")

    texts = gather_texts(settings)

    assert [(p.name, p.domains, p.shifted) for p in settings.phases] == [
        ("mixed", ("python", "c", "docs"), False)
    ]
    assert len(texts.live["mixed"]) == 30
    assert not any(texts.held_out.values()) and not any(texts.warmup.values())


def test_a_file_with_too_few_prompts_says_how_many_are_needed(tmp_path: Path):
    settings = with_prompts(DemoSettings(kept=Kept(4, 1)), file_of(tmp_path, mail=6))

    with pytest.raises(DemoError, match=r"6 prompts of domain 'mail'; at least 7 are needed"):
        gather_texts(settings)


def test_a_file_with_too_many_domains_names_them(tmp_path: Path):
    with pytest.raises(PromptError, match=r"5 domains \(a, b, c, d, e\)"):
        with_prompts(DemoSettings(), file_of(tmp_path, a=1, b=1, c=1, d=1, e=1))


def test_completions_of_the_bundled_target_are_texts():
    phases = (Phase("docs", "docs", False, 1, 1),)

    texts = gather_texts(DemoSettings(phases=phases, max_requests=3, kept=Kept(1, 1)))

    assert all(isinstance(p, Prompt) and p.prompt and not p.messages for p in texts.live["docs"])


def test_a_folder_without_the_marker_is_left_alone(tmp_path: Path):
    precious = tmp_path / "weights" / "mine"
    precious.mkdir(parents=True)

    with pytest.raises(DemoError, match="nothing in it was touched"), own_folder(tmp_path):
        pass

    assert precious.exists()
    assert not (tmp_path / MARKER).exists()


def test_second_run_removes_what_the_first_wrote_and_nothing_else(tmp_path: Path):
    run_dir = tmp_path / "demo"
    with own_folder(run_dir):
        (run_dir / "weights" / "3").mkdir(parents=True)
        (run_dir / "report.json").write_text("{}")
        (run_dir / "notes.txt").write_text("mine")

    with own_folder(run_dir):
        assert sorted(p.name for p in run_dir.iterdir()) == [MARKER, "notes.txt"]


def test_two_demos_do_not_share_a_folder(tmp_path: Path):
    with (
        own_folder(tmp_path),
        pytest.raises(DemoError, match="another demo runs"),
        own_folder(tmp_path),
    ):
        pass


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")

    for run_dir in (tmp_path / "taken", tmp_path / "taken" / "demo"):
        with (
            pytest.raises(DemoError, match=r"taken.* cannot be written .*--run-dir"),
            own_folder(run_dir),
        ):
            pass


def test_the_folder_of_a_run_has_one_option():
    # As a setting it would reach server and trainer alone, and the demo would wait for them.
    with pytest.raises(typer.BadParameter, match="with --run-dir"):
        main(set_=["run_dir=elsewhere"])


def test_a_report_that_cannot_be_written_says_so_and_loses_no_figures(tmp_path: Path):
    recording = sample_recording()
    (tmp_path / "report.json").mkdir()

    assert "could not be written" in why_not_written(tmp_path, recording)
    assert Recording.from_json((tmp_path / "recording.json").read_text()) == recording

    (tmp_path / "report.json").rmdir()
    assert why_not_written(tmp_path, recording) is None


def test_changes_of_version_are_the_servers_own_swaps_and_rollbacks():
    history = [
        {"unix_s": 1010.0, "event": "swapped", "version": 1},
        {"unix_s": 1020.0, "event": "trial of the former version", "version": 0},
        {"unix_s": 1025.0, "event": "trial over", "version": 1},
        {"unix_s": 1030.0, "event": "rolled back from 1: acceptance fell", "version": 0},
    ]

    assert version_changes(history, began_unix_s=1000.0) == [
        VersionChange(10.0, 1, False),
        VersionChange(30.0, 0, True),
    ]


def printed(report: dict[str, object]) -> str:
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(*summary(report))
    return captured.get()


def test_terminal_headline_is_coloured_by_its_figures():
    report = build_report(sample_recording())
    green, red = "\x1b[1;32m", "\x1b[1;31m"

    assert f"{green}Learning paid: 1.44 times" in printed(report)
    assert f"{red}Learning did not pay" in printed({**report, "speedup_vs_static": 0.96})
    assert f"{red}Learning did not pay" in printed({**report, "speedup_vs_index": 0.96})


def test_terminal_says_what_learning_took():
    assert "CPU-seconds in 400 updates" in printed(build_report(sample_recording()))


def moment(**changes: object) -> Now:
    answers = sample_answers(per_phase=10)
    fields = {
        "phases": ("python", "c"),
        "phase": answers[-1].phase,
        "phase_s": 20.0,
        "share": 0.5,
        "at_s": answers[-1].finished_s,
        "answers": answers,
        "version": 3,
        "newest_version": 5,
        "swaps": 4,
        "rollbacks": 1,
        "failed": 0,
    }
    return Now(**{**fields, **changes})


def test_line_names_phase_speed_version_and_staleness():
    text = line(moment())

    assert "python-again" in text
    assert "version 3  staleness 2" in text
    assert "40 requests" in text


def test_nothing_answered_shows_dashes_instead_of_zeros():
    assert moment(answers=()).tokens_per_s is None
    assert "– tokens/s" in line(moment(answers=()))


def test_sparkline_goes_from_plain_to_its_maximum():
    text = sparkline(sample_answers(per_phase=60), width=20)

    assert len(text) == 20
    assert text[0] in "▇█" and text[5] < text[9]
    assert sparkline(()) == ""


def test_the_demo_says_how_to_look_at_what_it_reports(tmp_path: Path):
    silent = DemoSettings(run_dir=tmp_path)
    asked = ("wandb.mode=offline", "tensorboard.enabled=true")

    assert how_to_look(silent) == []
    wandb, tensorboard = how_to_look(DemoSettings(run_dir=tmp_path, overrides=asked))
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in wandb
    assert "python -m reporting.dashboard" in wandb
    assert tensorboard.strip() == f"tensorboard --logdir {tmp_path}/tensorboard"
    assert settings_of(silent).reports.domains == ("python", "c", "docs")
