"""The picture of an evaluation: an SVG file that needs nothing to draw and nothing to read."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from policies.evaluation import Evaluation, Judged, Load

_INK, _FAINT, _PLAIN, _FIXED, _POLICY, _ORACLE = (
    "#2b3440", "#d8dde3", "#a3acb9", "#e3a046", "#2f6fb0", "#4fa58c",
)  # fmt: skip
_CURVES = ("#2f6fb0", "#e3a046", "#4fa58c", "#c0392b", "#8e6bbf", "#6b7785", "#b58b53", "#2b3440")
_WIDTH, _LEFT, _BAR, _GAP = 760, 190, 16, 6
_CURVE_HEIGHT = 220


def picture(found: Evaluation) -> str:
    """Bars of every policy's speed over plain decoding, and curves of fixed K at every load."""
    bars = list(found.policies)
    height = 60 + len(bars) * (_BAR + _GAP) + 50 + _CURVE_HEIGHT + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(12, 22, f"Speed over plain decoding, {found.num_steps} steps of {found.drafter}", 14),
        *_bars(bars, 40),
        *_curves(found.loads, 60 + len(bars) * (_BAR + _GAP) + 30),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bars(policies: list[Judged], top: float) -> Iterator[str]:
    longest = max(one.over_plain for one in policies)
    scale = (_WIDTH - _LEFT - 110) / longest
    for number, one in enumerate(policies):
        y = top + number * (_BAR + _GAP)
        width = one.over_plain * scale
        yield _text(_LEFT - 8, y + 12, one.name, anchor="end")
        yield (
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" '
            f'fill="{_colour(one.name)}"/>'
        )
        label = f"{one.over_plain:.3f} (regret {100 * one.regret_fixed:+.1f} %)"
        yield _text(_LEFT + width + 5, y + 12, label, 10)
    bottom = top + len(policies) * (_BAR + _GAP)
    x = _LEFT + scale
    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom}" stroke="{_INK}"/>'


def _colour(name: str) -> str:
    if name.startswith("fixed"):
        return _PLAIN if name.endswith("= 0") else _FIXED
    return _ORACLE if name.startswith("oracle") else _POLICY


def _curves(loads: tuple[Load, ...], top: float) -> Iterator[str]:
    yield _text(
        12, top, "Speed of each fixed K over plain decoding, by smallest batch of a load", 14
    )
    most_k = max(len(load.rates) for load in loads) - 1
    highest = max(max(load.rates) / load.plain_rate for load in loads)
    width, base = _WIDTH - 120, top + 20 + _CURVE_HEIGHT

    def place(k: int, speed: float) -> str:
        x = 50 + width * k / max(most_k, 1)
        return f"{x:.1f},{base - (_CURVE_HEIGHT - 10) * speed / highest:.1f}"

    for k in range(most_k + 1):
        x = place(k, 0).partition(",")[0]
        yield _text(float(x), base + 16, f"K = {k}", 10, anchor="middle")
    level = place(0, 1.0).partition(",")[2]
    yield (
        f'<line x1="50" x2="{50 + width}" y1="{level}" y2="{level}" stroke="{_FAINT}" '
        f'stroke-width="2"/>'
    )
    for load, colour in zip(loads, _CURVES * len(loads), strict=False):
        speeds = [rate / load.plain_rate for rate in load.rates]
        points = " ".join(place(k, speed) for k, speed in enumerate(speeds))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        x, y = place(most_k, speeds[-1]).split(",")
        yield _text(float(x) + 6, float(y) + 4, str(load.smallest_batch), 11, colour=colour)


def _text(
    x: float, y: float, text: str, size: int = 12, *, anchor: str = "start", colour: str = _INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
