"""The picture (SVG) and the page (HTML) of a demo, each a self-contained file.

python -m examples.picture runs/demo     # write the reports again from the recording
"""

from __future__ import annotations

import html
import io
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.arms import ALL_ARMS, Arm
from examples.recording import Answer, Recording
from examples.report import (
    PHASE_COLUMNS,
    Mood,
    build_report,
    busy_line,
    checks,
    headline,
    learning_line,
    mood_of_faults,
    mood_of_speedup,
    phase_rows,
    ratio,
    shown,
    tokens_per_step,
    verdict,
)

RECORDING_NAME = "recording.json"
WINDOW = 16
"""Number of requests each point of the picture's curves averages over."""

COLOURS: dict[Arm, str] = {
    "plain": "#a3acb9",
    "static": "#e3a046",
    "index": "#4fa58c",
    "tuned": "#2f6fb0",
    "drafter_alone_static": "#f3d6ab",
    "drafter_alone_tuned": "#a9c7e3",
}
LABELS: dict[Arm, str] = {
    "plain": "plain decoding",
    "static": "static: frozen drafter, index of the request",
    "index": "index: frozen drafter, index of recent traffic",
    "tuned": "tuned: newest drafter, index of recent traffic",
    "drafter_alone_static": "frozen drafter alone",
    "drafter_alone_tuned": "newest drafter alone",
}
INK = "#2b3440"
SWAP_COLOUR, ROLLBACK_COLOUR = "#6b7785", "#c0392b"
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


# Curves


def rolling(
    recording: Recording, figure: Callable[[Sequence[Answer], float], float | None]
) -> list[list[tuple[int, float]]]:
    """For each phase: (request number, figure over the phase's last ``WINDOW`` answers).

    ``figure`` gets the window's answers and the seconds they took together.
    """
    curves, done = [], 0
    for span in recording.phases:
        answers = [answer for answer in recording.answers if answer.phase == span.name]
        starts_s = [span.started_s, *(answer.finished_s for answer in answers)]
        curve = []
        for last in range(max(0, min(WINDOW // 2, len(answers)) - 1), len(answers)):
            first = max(0, last + 1 - WINDOW)
            value = figure(answers[first : last + 1], answers[last].finished_s - starts_s[first])
            if value is not None:
                curve.append((done + last + 1, value))
        curves.append(curve)
        done += len(answers)
    return curves


def window_tokens_per_s(answers: Sequence[Answer], seconds: float) -> float | None:
    return sum(answer.num_tokens for answer in answers) / seconds if seconds > 0 else None


def window_tokens_per_step(answers: Sequence[Answer], seconds: float) -> float | None:
    return tokens_per_step(answers)


def num_answered(recording: Recording, at_s: float) -> int:
    """Live requests that had finished by ``at_s``: the position of that moment on the x axis."""
    return bisect_right(recording.answers, at_s, key=lambda answer: answer.finished_s)


# Picture


def draw(recording: Recording, report: dict[str, Any]) -> str:
    """The picture as SVG text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "slipstream",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": "#c8ced6",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with pyplot.rc_context(style):
        figure, (steps, speed, bars) = pyplot.subplots(
            3, 1, figsize=(10.5, 10), height_ratios=(3, 2.4, 3), layout="constrained"
        )
        speed.sharex(steps)
        _draw_curves(steps, rolling(recording, window_tokens_per_step), "tokens per step", 1)
        _draw_curves(speed, rolling(recording, window_tokens_per_s), "tokens/s, all clients", 0)
        _draw_levels(steps, recording, report, "static_tokens_per_step")
        # One request at a time is another load than the traffic's: no level to compare with.
        if recording.replay_clients == recording.num_clients:
            _draw_levels(speed, recording, report, "static_tokens_per_s")
        _draw_legend(speed, any(change.rolled_back for change in recording.changes))
        _draw_phases(steps, speed, recording)
        _draw_swaps(steps, speed, recording)
        steps.tick_params(labelbottom=False)
        speed.set_xlabel("requests answered", loc="left")
        _draw_bars(bars, report)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
        pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_curves(axes: Any, curves: list[list[tuple[int, float]]], label: str, low: float) -> None:
    for curve in filter(None, curves):
        axes.plot(*zip(*curve, strict=True), color=COLOURS["tuned"], linewidth=2)
    highest = max((value for curve in curves for _, value in curve), default=1.0)
    axes.set_ylabel(label)
    axes.set_ylim(low, max(highest, low + 0.1) * 1.15)
    axes.grid(axis="y", color="#e8ebef", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_levels(axes: Any, recording: Recording, report: dict[str, Any], key: str) -> None:
    """A dashed line in each phase at the static arm's figure on its held-out prompts."""
    levels = {phase["name"]: phase[key] for phase in report["phases"]}
    known = [level for level in levels.values() if level is not None]
    for name, first, last in _bounds(recording):
        if levels[name] is not None:
            axes.hlines(
                levels[name], first, last,
                color=COLOURS["static"], linewidth=1.6, linestyles="dashed",
            )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low, max([high, *(1.1 * level for level in known)]))


def _bounds(recording: Recording) -> list[tuple[str, float, float]]:
    """(phase, first request number, last request number), for each phase."""
    bounds, done = [], 0
    for span in recording.phases:
        count = sum(answer.phase == span.name for answer in recording.answers)
        bounds.append((span.name, done + 0.5, done + count + 0.5))
        done += count
    return bounds


def _draw_legend(axes: Any, has_rollbacks: bool) -> None:
    axes.plot([], [], color=COLOURS["tuned"], linewidth=2, label="live traffic")
    axes.plot(
        [], [], color=COLOURS["static"], linewidth=1.6, linestyle="dashed", label="static arm"
    )
    axes.plot([], [], color=SWAP_COLOUR, marker="v", linestyle="", label="new version swapped in")
    if has_rollbacks:
        axes.plot([], [], color=ROLLBACK_COLOUR, marker="^", linestyle="", label="rolled back")
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.1), frameon=False, ncols=4, fontsize=9)


def _draw_phases(steps: Any, speed: Any, recording: Recording) -> None:
    for index, (name, first, last) in enumerate(_bounds(recording)):
        for axes in (steps, speed):
            axes.axvspan(first, last, color="#f4f6f8" if index % 2 else "#ffffff", zorder=0)
            if index:
                axes.axvline(first, color="#8b96a3", linewidth=1)
        steps.annotate(
            name,
            ((first + last) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 16),
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
    steps.set_xlim(0.5, max(1, len(recording.answers)) + 0.5)


def _draw_swaps(steps: Any, speed: Any, recording: Recording) -> None:
    for change in recording.changes:
        number = num_answered(recording, change.at_s) + 0.5
        colour = ROLLBACK_COLOUR if change.rolled_back else SWAP_COLOUR
        for axes in (steps, speed):
            axes.axvline(number, color=colour, linewidth=0.7, alpha=0.5)
        steps.annotate(
            f"{change.version}",
            (number, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
        steps.plot(
            number,
            1,
            marker="^" if change.rolled_back else "v",
            color=colour,
            markersize=5,
            transform=steps.get_xaxis_transform(),
            clip_on=False,
        )


def _draw_bars(axes: Any, report: dict[str, Any]) -> None:
    phases = report["phases"]
    width = 0.9 / len(ALL_ARMS)
    for offset, arm in enumerate(ALL_ARMS):
        heights = [phase[f"{arm}_tokens_per_s"] or 0.0 for phase in phases]
        middle = (len(ALL_ARMS) - 1) / 2
        places = [index + (offset - middle) * width for index in range(len(phases))]
        drawn = axes.bar(places, heights, width=0.94 * width, color=COLOURS[arm], label=LABELS[arm])
        texts = [times(p[f"{arm}_tokens_per_s"], p["plain_tokens_per_s"]) for p in phases]
        if arm != "plain":
            axes.bar_label(drawn, texts, padding=2, fontsize=7.5)
    axes.set_xticks(range(len(phases)), [phase["name"] for phase in phases])
    axes.set_ylabel(f"tokens/s, {_num_requests(report['replay_clients'])} at a time")
    axes.set_title("Held-out prompts by all arms, over plain decoding", fontsize=10.5, loc="left")
    axes.margins(y=0.12)
    axes.legend(
        loc="upper center", frameon=False, ncols=3, bbox_to_anchor=(0.5, -0.1), fontsize=8.5
    )


def times(value: float | None, base: float | None) -> str:
    """How many times as fast, for a bar's label."""
    quotient = ratio(value, base)
    return "" if quotient is None else f"{quotient:.2f}×"


def _num_requests(number: int) -> str:
    return "one request" if number == 1 else f"{number} requests"


# Page

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Slipstream demo</title>
<style>
body {{ margin: 0 auto; max-width: 64rem; padding: 2rem 1.2rem 4rem; background: #fbfcfd;
  color: #2b3440; font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .6rem; }}
.lead {{ margin: 0 0 1.4rem; color: #5a6673; }}
.cards {{ display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: 1.4rem; }}
.card {{ flex: 1 1 9rem; background: #fff; border: 1px solid #e3e8ee; border-radius: .6rem;
  padding: .8rem 1rem; }}
.card b {{ display: block; font-size: 1.7rem; line-height: 1.2; }}
.picture {{ background: #fff; border: 1px solid #e3e8ee; border-radius: .6rem; padding: .8rem; }}
.picture svg {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; width: 100%; background: #fff; font-size: .94rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .7rem; border-bottom: 1px solid #e3e8ee; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} th {{ color: #5a6673; font-weight: 600; }}
.good {{ color: #14866d; }} .bad {{ color: #c0392b; }}
td.good, td.bad {{ font-weight: 600; }}
dt {{ font-weight: 600; margin-top: .5rem; }} dd {{ margin: 0; color: #5a6673; }}
</style></head><body>
<h1 class="{mood}">{headline}</h1>
<p class="lead">{lead}</p>
<div class="cards">{cards}</div>
<div class="picture">{picture}</div>
<h2>Phase by phase</h2>{phases}
<h2>Goals</h2>{checks}
<h2>How it was measured</h2><dl>{definitions}</dl>
<h2>Machine</h2><dl>{machine}</dl>
</body></html>
"""


def render_html(recording: Recording, report: dict[str, Any]) -> str:
    """``report.html``: one self-contained file."""
    text, mood = headline(report)
    return _PAGE.format(
        headline=html.escape(text),
        mood=mood,
        lead=_lead(report),
        cards="".join(_card(*card) for card in _cards(report)),
        picture=draw(recording, report),
        phases=_table(PHASE_COLUMNS, phase_rows(report)),
        checks=_table(("", "measured", "goal", ""), _check_rows(report)),
        definitions=_definition_list(report["definitions"]),
        machine=_definition_list(recording.machine),
    )


def _lead(report: dict[str, Any]) -> str:
    names = " → ".join(phase["name"] for phase in report["phases"])
    return html.escape(
        f"{report['live_requests']} live requests in {len(report['phases'])} phases ({names}); "
        f"drafter versions swapped in: {report['swaps']}, rolled back: {report['rollbacks']}; "
        f"{report['seconds']:.0f} s in all. Target {report['target']}, temperature "
        f"{report['temperature']:g}. {learning_line(report)} {busy_line(report)}"
    )


def _cards(report: dict[str, Any]) -> list[tuple[str, str, Mood]]:
    """(figure, what it is, mood)."""
    plain, static, index = (report[f"speedup_vs_{arm}"] for arm in ("plain", "static", "index"))
    failed, changed = report["failed_requests"], report["mismatched_outputs"]
    return [
        (shown(plain, "×"), "plain decoding, on shifted traffic", mood_of_speedup(plain)),
        (shown(static, "×"), "the frozen server, on shifted traffic", mood_of_speedup(static)),
        (shown(index, "×"), "by the newest weights alone", mood_of_speedup(index)),
        (str(report["swaps"]), "swaps", "neutral"),
        (str(failed), "failed requests", mood_of_faults(failed)),
        (str(changed), "changed outputs", mood_of_faults(changed)),
    ]


def _check_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (check.name, shown(check.value), f"{check.kind} {check.limit:g}", verdict(check))
        for check in checks(report)
    ]


def _card(value: str, text: str, mood: Mood) -> str:
    shown_value = f'<b class="{mood}">{html.escape(value)}</b>'
    return f'<div class="card">{shown_value}{html.escape(text)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heading = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{heading}</tr>{body}</table>"


def _cell(text: str) -> str:
    mark = {"PASS": ' class="good"', "FAIL": ' class="bad"'}.get(text, "")
    return f"<td{mark}>{html.escape(text)}</td>"


def _definition_list(items: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {part}" for name, part in value.items())
        return str(value)

    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text(value))}</dd>"
        for name, value in items.items()
    )


# Files


def write(run_dir: Path, recording: Recording) -> dict[str, Any]:
    """Write the recording, report.json, report.html and report.svg into ``run_dir``."""
    report = build_report(recording)
    files = {
        RECORDING_NAME: recording.to_json(),
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.html": render_html(recording, report),
        "report.svg": draw(recording, report),
    }
    for name, text in files.items():
        (run_dir / name).write_text(text, encoding="utf-8")
    return report


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder, Recording.from_json((folder / RECORDING_NAME).read_text(encoding="utf-8")))
