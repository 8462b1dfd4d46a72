"""Windows of live requests, held against the arms of a replay and split into what they were made
of."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import typer

from benchmarks.harness.demos import recording_of
from benchmarks.harness.results import RESULTS
from benchmarks.real.learning import LIVE_WINDOW, figures_of, live_figures, window_figures
from benchmarks.real.sharing import Way, ways_of
from oracles.support import REPOSITORY


def answers(phase: str, from_s: float, each_s: float, num: int) -> list[dict[str, Any]]:
    """Answers of 100 tokens in 50 steps of one draft token."""
    spent = {"num_steps": 50, "num_proposed": 50, "num_accepted": 50}
    return [
        {
            "phase": phase,
            "finished_s": from_s + each_s * n,
            "num_tokens": 100,
            "acceptance": spent,
        }
        for n in range(num)
    ]


def phase(name: str, plain: float, static: float) -> dict[str, Any]:
    return {
        "name": name,
        "plain_tokens_per_s": plain,
        "static_tokens_per_s": static,
        "index_tokens_per_s": None,
    }


def test_windows_are_held_against_the_best_arm_and_against_plain_decoding() -> None:
    recording = {
        "answers": [
            *answers("code", 0.0, 0.010, LIVE_WINDOW),  # 10,000 tokens/s
            *answers("code", 10.0, 0.008, LIVE_WINDOW),
            *answers("code", 20.0, 0.001, LIVE_WINDOW - 1),  # not a whole window
            *answers("math", 30.0, 0.005, LIVE_WINDOW),
        ],
        "changes": [{"at_s": 1.0}, {"at_s": 4.0}, {"at_s": 12.0}],
    }
    report = {"phases": [phase("code", 8000.0, 20000.0), phase("math", 16000.0, 25000.0)]}
    began = 1000.0
    events = [
        {"event": "gate", "unix_ms": 1000 * (began + 2.0), "seconds": 1.0},
        {"event": "update", "unix_ms": 1000 * (began + 4.0), "seconds": 1.5},
        {"event": "published", "unix_ms": 1000 * (began + 4.1)},
        {"event": "update", "unix_ms": 1000 * (began + 31.0), "seconds": 0.25},
    ]

    found = window_figures(recording, report, events, began)

    assert found["by_phase"]["code"] == pytest.approx([0.5, 0.625])
    assert found["by_phase"]["math"] == pytest.approx([0.8])
    assert found["worst"] == pytest.approx(0.5)
    assert found["worst_later"] == pytest.approx(0.8)
    assert found["worst_over_plain"] == pytest.approx(1.25)
    first, second, last = found["windows"]
    assert first["over_plain"] == pytest.approx(1.25) and last["over_plain"] == pytest.approx(1.25)
    assert first["tokens_per_step"] == 2.0 and first["draft_tokens_per_step"] == 1.0
    assert first["request_steps_per_s"] == pytest.approx(50 * LIVE_WINDOW / 4.99)
    assert first["trainer_share"] == pytest.approx(2.5 / 4.99)
    assert second["trainer_share"] == 0.0
    assert last["trainer_share"] == pytest.approx(0.25 / 2.495, rel=1e-3)
    assert [w["swaps"] for w in found["windows"]] == [2, 1, 0]


def test_without_a_whole_window_there_is_no_worst_one() -> None:
    recording = {"answers": answers("code", 0.0, 0.01, 3), "changes": []}

    found = window_figures(recording, {"phases": [phase("code", 1.0, 1.0)]})

    assert found["worst"] is found["worst_later"] is found["worst_over_plain"] is None


def test_a_shift_brings_a_version_and_not_the_former_one_back() -> None:
    recording = {
        "answers": answers("code", 1.0, 1.0, 10) + answers("law", 11.0, 1.0, 10),
        "phases": [
            {"name": "code", "started_s": 0.0, "ended_s": 10.5},
            {"name": "law", "started_s": 10.5, "ended_s": 21.0},
        ],
        "changes": [
            {"at_s": 3.5, "version": 1, "rolled_back": False},
            {"at_s": 12.5, "version": 0, "rolled_back": True},
            {"at_s": 15.5, "version": 2, "rolled_back": False},
        ],
    }

    assert live_figures(recording)["requests_to_first_swap"] == {"code": 3, "law": 5}


def test_what_is_no_finished_demo_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no report\.json; name the folder of a finished"):
        figures_of(tmp_path)

    (tmp_path / "logs").mkdir()
    (tmp_path / "trainer").mkdir()
    for name in ("report.json", "recording.json", "trainer/status.json", "logs/server.log"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "trainer" / "log.jsonl").write_text('{"event": "started", "unix_ms": 1}\n')
    with pytest.raises(ValueError, match="made too few updates, or published no version"):
        figures_of(tmp_path)


def test_a_folder_without_a_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"holds no recording\.json; name the folder of"):
        recording_of(tmp_path)


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", ["learning", "learning_own", "learning_auto"])
def test_the_readme_shows_the_present_figures_of_learning(name: str) -> None:
    runs = results(name)["runs"]
    readme = (REPOSITORY / "README.md").read_text()
    (row,) = (line for line in readme.splitlines() if line[:1] == "|" and f"/{name}.json" in line)

    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]

    def usual(part: str, measure: str) -> float:
        return median(run[part][measure] for run in runs)

    assert cells == [
        f"{usual('report', 'speedup_vs_plain'):.2f}",
        f"{usual('report', 'speedup_vs_static'):.2f}",
        f"{round(usual('loop', 'rows_per_s'), -3):,.0f}",
        f"{usual('windows', 'worst_over_plain'):.2f}",
    ]


def test_documents_show_the_present_figures_of_cells() -> None:
    def figures(temperature: float, scope: str, base: str) -> list[str]:
        own = [cell for cell in results("cells")["cells"] if cell["temperature"] == temperature]
        found = {cell["clients"]: cell["by_domain"][scope] for cell in own}
        return [
            f"{f['vs_plain']['tuned'] if base == 'plain' else f['tuned_over_static']:.2f}"
            for f in (found[1], found[8], found[32])
        ]

    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    table = (REPOSITORY / "docs" / "performance.md").read_text()
    for temperature in (0.7, 0.0):
        over_plain = figures(temperature, "all", "plain")
        over_static = figures(temperature, "shifted", "static")
        assert "{}, {} and {}".format(*over_plain) in readme
        assert "{}, {} and {}".format(*over_static) in readme
        (line,) = (
            line for line in table.splitlines()
            if line.startswith(f"| tuned ÷ plain, all domains, {temperature:g} |")
        )  # fmt: skip
        assert [cell.split()[0] for cell in line.strip("| ").split("|")[1:]] == over_plain


def test_ways_to_share_a_card() -> None:
    found = ways_of("1,auto", "0.05,0.2", "1,0.5")

    assert found == [
        Way(1.0, 0.05, 1.0),
        Way(1.0, 0.05, 0.5),
        Way("auto", 0.05, 1.0),
        Way("auto", 0.05, 0.5),
        Way("auto", 0.2, 1.0),
        Way("auto", 0.2, 0.5),
    ]
    assert str(found[1]) == "duty 1, 50% of the multiprocessors"
    assert str(found[4]) == "duty auto, serving may lose 20%"
    assert found[4].overrides == (
        "trainer.duty=auto",
        "trainer.max_serving_loss=0.2",
        "trainer.gpu_share=1.0",
    )
