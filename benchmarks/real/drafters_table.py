"""What the table of drafters shows: names of its rows, what it claims, and its text."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.arms import LOOKUP
from benchmarks.harness.results import Row, at_least
from benchmarks.real import parity
from benchmarks.real.choosing import ARM_DOMAINS, PLAIN, TRAINED_AT
from configs.load import load_settings
from examples.plan import REAL_CONFIGS
from targets.find import target_name
from trainer.gate import GATE_DRAFT_K

POLICY = "policy"
FAST_GREEDY, FAST_SAMPLED = 2.0, 1.5
"""Of plain decoding, which the best drafter is to reach for one client on code."""
ROWS = 2_000_000
"""Positions that a drafter is trained on unless its row says otherwise."""
_QUANTIZED = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)
"""End of the name of a GGUF file: how its weights are stored."""


# Names


def model_name(target: str) -> str:
    """Name of a target, without how its weights are stored."""
    return _QUANTIZED.sub("", target_name(target))


def usual_model() -> str:
    """The target of rows that name none."""
    return model_name(load_settings(REAL_CONFIGS, [], {}).target)


def row_name(kind: str, target: str, num_rows: int | None, chosen: Sequence[str]) -> str:
    """Key of a row: its kind, and whatever is not usual about it.

    Args:
        target: as the settings name it.
        num_rows: positions that it is trained on; ``None``: it does not learn.
        chosen: settings, ``a.b=c``.
    """
    model = model_name(target)
    parts = [kind, *([] if model == usual_model() else [model])]
    if num_rows not in (None, ROWS):
        parts.append(f"{num_rows:,} positions")
    return ", ".join([*parts, *(one for one in chosen if not one.startswith("target="))])


def _by_target(kinds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of each target, the usual one first."""
    found: dict[str, dict[str, Any]] = {usual_model(): {}}
    for name, figures in kinds.items():
        found.setdefault(figures.get("target", usual_model()), {})[name] = figures
    return found


# Claims


def claims(kinds: dict[str, Any]) -> list[Row]:
    """What the table must show; the best drafter is that of the usual target."""
    of_each = _by_target(kinds)
    found = [row for own in of_each.values() for row in _claims(own)]
    return found + _fastest(of_each[usual_model()])


def _claims(kinds: dict[str, Any]) -> list[Row]:
    """What rows of one target show."""
    found: list[Row] = []
    to_pass = _to_pass(kinds)
    for kind, figures in kinds.items():
        for cell in figures["cells"]:
            if cell["arm"] != PLAIN:
                found += _ratios(kind, cell)
        curve = figures.get("curve")
        if not curve:
            continue
        if "parity" in figures:
            found += parity.claims({kind: figures["parity"]})
        if to_pass:
            passed = _passed(curve, to_pass)
            about = f"{kind}, from nothing to more tokens per step than the index's {to_pass:.2f}"
            for name, unit in (("rows", "rows trained"), ("seconds", "seconds of updates")):
                needed = passed[name] if passed else None
                found.append(Row(about, unit, needed, "at some time", passed is not None))
    return found


def _to_pass(kinds: dict[str, Any]) -> float | None:
    """Tokens per step of the index of one target; ``None`` if it was not measured."""
    index = next((f for name, f in kinds.items() if name.partition(", ")[0] == LOOKUP), None)
    return None if index is None else _mean_at(index["cells"], TRAINED_AT, GATE_DRAFT_K)


def _passed(curve: Sequence[dict[str, Any]], to_pass: float) -> dict[str, Any] | None:
    """Where a drafter was first judged better than that."""
    return next((j for j in curve if (j["tokens_per_step"] or 0) > to_pass), None)


def _fastest(kinds: dict[str, Any]) -> list[Row]:
    found: list[Row] = []
    for temperature, least in ((0.0, FAST_GREEDY), (0.7, FAST_SAMPLED)):
        fastest = [
            (cell["vs_plain"][ARM_DOMAINS[0]], f"{kind}, {cell['arm']}")
            for kind, figures in kinds.items()
            for cell in figures["cells"]
            if (cell["clients"], cell["temperature"]) == (1, temperature) and cell["arm"] != PLAIN
            and kind.partition(", ")[0] != LOOKUP
        ]  # fmt: skip
        if fastest:
            value, who = max(fastest)
            about = f"best drafter, 1 client, temperature {temperature:g}, {ARM_DOMAINS[0]} ({who})"
            found.append(at_least(about, "tokens/s over plain decoding", value, least))
    return found


def _ratios(kind: str, cell: dict[str, Any]) -> list[Row]:
    about = f"{kind}, {cell['clients']} clients, temperature {cell['temperature']:g}"
    return [
        Row(
            f"{about}, {domain}, {cell['arm']}",
            "tokens/s over plain decoding", cell["vs_plain"][domain], None, None,
        )
        for domain in ARM_DOMAINS
    ]  # fmt: skip


def _mean_at(cells: Sequence[dict[str, Any]], temperature: float, draft_k: int) -> float | None:
    """Mean over domains of an arm's tokens per step, with as few clients as were measured."""
    own = [c for c in cells if c["temperature"] == temperature and c["arm"] == f"K = {draft_k}"]
    if not own:
        return None
    fewest = min(own, key=lambda c: int(c["clients"]))
    tokens: list[float] = list(fewest["tokens_per_step"].values())
    return statistics.mean(tokens)


def table(kinds: dict[str, Any]) -> str:
    """For docs/drafters.md: speeds over plain decoding of the best fixed K and of the policy, one
    table for each target."""
    usual, *others = _by_target(kinds).items()
    parts = [_table(usual[1])]
    return "\n".join(parts + [f"\nThe same on {model}:\n\n{_table(own)}" for model, own in others])


def day_0(kinds: dict[str, Any]) -> str:
    """For docs/drafters.md: when each drafter of the usual target that began from nothing passed
    the index, the first one first. Its traces are of requests that were answered before its first
    update."""
    own = _by_target(kinds)[usual_model()]
    to_pass = _to_pass(own)
    if to_pass is None:
        return ""
    lines = [
        f"| drafter | requests | positions trained on, to pass the index's {to_pass:.2f} | "
        "seconds of updates |",
        "|---" * 4 + "|",
    ]
    learnt = [(name, figures) for name, figures in own.items() if figures.get("curve")]
    found = [(name, figures, _passed(figures["curve"], to_pass)) for name, figures in learnt]
    for name, figures, passed in sorted(found, key=lambda f: f[2]["rows"] if f[2] else math.inf):
        requests = f"{figures['collected']['requests']:,}"
        rows = f"not within {figures['curve'][-1]['rows']:,}"
        seconds = ""
        if passed is not None:
            rows, seconds = f"{passed['rows']:,}", f"{passed['seconds']:.1f}"
        lines.append(f"| {_shown(name)} | {requests} | {rows} | {seconds} |")
    return "\n".join(lines)


def _shown(name: str) -> str:
    """Name of a row, its kind as code."""
    kind, _, rest = name.partition(", ")
    return f"`{kind}`, {rest}" if rest else f"`{kind}`"


def _table(kinds: dict[str, Any]) -> str:
    lines = [
        "| drafter | parameters | drafting, K = 4 | temperature | clients | "
        + " | ".join(ARM_DOMAINS) + " |",
        "|---" * (5 + len(ARM_DOMAINS)) + "|",
    ]  # fmt: skip
    for name, figures in kinds.items():
        cells = figures["cells"]
        for temperature, clients in dict.fromkeys((c["temperature"], c["clients"]) for c in cells):
            own = [c for c in cells if (c["temperature"], c["clients"]) == (temperature, clients)]
            said = [_said(own, domain) for domain in ARM_DOMAINS]
            parameters = figures.get("parameters")
            size = f"{parameters / 1e6:.1f} M" if parameters else ""
            spent_s = figures.get("draft_seconds", {}).get(str(clients))
            spent = "" if spent_s is None else f"{spent_s * 1e3:.2f} ms"
            lines.append(
                f"| {_shown(name)} | {size} | {spent} | {temperature:g} | {clients} | "
                + " | ".join(said) + " |"
            )  # fmt: skip
    return "\n".join(lines)


def _said(cells: Sequence[dict[str, Any]], domain: str) -> str:
    fixed = [c for c in cells if c["arm"] not in (PLAIN, POLICY)]
    best = max(fixed, key=lambda c: float(c["vs_plain"][domain]))
    own = next(c for c in cells if c["arm"] == POLICY)
    tokens = best["tokens_per_step"][domain]
    ratio = best["vs_plain"][domain]
    return f"{ratio:.2f} ({best['arm']}, {tokens:.2f}), {own['vs_plain'][domain]:.2f}"
