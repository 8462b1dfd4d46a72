"""A drafter replayed along the target's text keeps what it kept when it served."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load
from typer.testing import CliRunner

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.fingerprint import target_fingerprint
from buffer.interface import TraceLimits
from buffer.manifest import TENSORS
from buffer.records import Trace
from configs.schema import DrafterSettings, EngineSettings, Settings, TrainerSettings
from drafters.protocol import Weights
from oracles.engines import RandomPolicy, make_engine, random_model, request_of
from policies.interface import Decision, StepObs
from policies.logged import steps_of
from policies.replayed_file import read_replayed, replayed_path, write_replayed
from policies.replayed_log import ReplayedLog
from policies.run_log import read_steps, replays
from specops.verify_logits import Rule
from targets.head import load_target_head
from tests.policies.logs import profile
from tests.serving.capture.test_capture import traces_of
from trainer.cli import app
from trainer.replayed_drafts import replayed_drafts
from trainer.start import newest_drafter

MOST = 4
ALL = range(100)


@dataclass
class AnyK(RandomPolicy):
    """Any K of the neural drafter."""

    numbers: random.Random = field(default_factory=lambda: random.Random(3))

    def plan(self, obs: StepObs) -> Decision:
        k = min(self.numbers.randint(0, MOST), obs.max_draft)
        return Decision("eagle3" if k else "none", k, 1 / (MOST + 1), False, "any", "any")


@dataclass(frozen=True)
class Run:
    """A run folder with a target, version 0 of its drafter, and what they have served."""

    settings: Settings
    traces: list[Trace]


def served(folder: Path, rule: Rule, params: dict[str, Any], num: int = 24) -> Run:
    model = random_model("qwen3")
    model.save_pretrained(folder / "target")
    settings = Settings(
        target=str(folder / "target"),
        run_dir=folder / "run",
        device="cpu",
        drafter=DrafterSettings(max_draft=MOST),
        engine=EngineSettings(verification="block" if rule is Rule.BLOCK else "standard"),
        trainer=TrainerSettings(device="cpu"),
    )
    fingerprint = target_fingerprint(folder / "target")
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    head = load_target_head(folder / "target", model.device, model.dtype)
    manifest, _ = newest_drafter(settings, store, head, fingerprint)
    weights = Weights(0, manifest.drafter_config, load(store.read(0).files[TENSORS]))
    engine = make_engine(
        model, kind="eagle3", weights=weights, policy=AnyK(), suffix=False, max_draft=MOST,
        rule=rule, overlaps=False,
    )  # fmt: skip
    # Traces hold bfloat16: let serving draft from the very numbers that are replayed.
    neural: Any = engine.drafting.neural["eagle3"].drafter
    observe = neural.observe
    neural.observe = lambda ids, rows, at: observe(ids, rows.bfloat16().float(), at)
    requests = [request_of(str(i), [7 * i % 90, 3, i % 90, 5], 40, **params) for i in range(num)]
    found, _ = traces_of(engine, requests)
    traces = [replace(trace, target_fingerprint=fingerprint) for trace in found.values()]
    return Run(settings, traces)


def every_round(monkeypatch):
    """Replay all rounds that drafted, also those whose outcome is known, to compare with it."""
    monkeypatch.setattr(
        "trainer.replayed_drafts._open",
        lambda trace, kinds: (x for x in trace.rounds if x.drafter == kinds[0] and x.draft_ids),
    )


def known(run, chances):
    """(Chances of the positions that were verified, tokens kept) of each round."""
    for trace in run.traces:
        for one in trace.rounds:
            found = chances.get((trace.producer, trace.epoch, trace.seq, one.anchor))
            if found is not None and one.draft_ids:
                yield found[: len(one.draft_ids)], one.num_accepted


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "seeded"])
def test_what_is_kept_by_match_is_kept_again(tmp_path, monkeypatch, params):
    run = served(tmp_path, Rule.BLOCK, params)
    every_round(monkeypatch)

    found = replayed_drafts(run.settings, "eagle3", run.traces, ALL)

    compared = list(known(run, found.chances))
    assert len(compared) > 300 and sum(kept for _, kept in compared) > 8
    for chances, kept in compared:
        expected = [1.0] * kept + [0.0] * (kept < len(chances))
        assert list(chances[: kept + 1]) == expected


@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_what_is_drawn_is_kept_as_often_as_the_replay_says(tmp_path, monkeypatch, rule):
    run = served(tmp_path, rule, {"temperature": 2.5}, num=48)
    every_round(monkeypatch)

    found = replayed_drafts(run.settings, "eagle3", run.traces, ALL)

    compared = list(known(run, found.chances))
    for position in range(2):
        reached = [
            (math.prod(chances[: position + 1]), kept > position)
            for chances, kept in compared
            if len(chances) > position
        ]
        chance = sum(one for one, _ in reached)
        error = math.sqrt(sum(one * (1 - one) for one, _ in reached))
        assert chance > 5 * error, "it says something"
        assert abs(sum(kept for _, kept in reached) - chance) < 3.5 * error


def test_longer_drafts_are_scored_by_the_replay_and_no_more_by_hazards(tmp_path):
    run = served(tmp_path, Rule.BLOCK, {"temperature": 2.5})
    found = replayed_drafts(run.settings, "eagle3", run.traces, ALL)
    assert 20 < len(found.chances) <= found.num_open

    def of(chances):
        return ReplayedLog.of(steps_of(run.traces, chances), "eagle3", profile(), MOST)

    by_hazards, replayed = of(None), of(found.chances)
    assert 0 < replayed.extrapolated.sum() < 0.5 * by_hazards.extrapolated.sum()
    rows = [row for step in replayed.steps for row in step.rows if row.replayed]
    assert len(rows) == len(found.chances)
    for at, step in enumerate(replayed.steps):
        own = [row for row in step.rows if row.replayed]
        if len(step.rows) == len(own) == step.batch == 1:
            [row] = own
            more = sum(
                math.prod(row.replayed[row.num_verified : k])
                for k in range(row.num_verified + 1, MOST + 1)
            )
            assert replayed.tokens[at, MOST] == pytest.approx(1 + row.num_verified + more)
            assert replayed.extrapolated[at].sum() == 0


def test_nothing_is_replayed_without_the_version_or_of_another_drafter(tmp_path, caplog):
    run = served(tmp_path, Rule.BLOCK, {"temperature": 2.5}, num=4)
    (run.settings.run_dir / "weights" / "0" / "drafter.safetensors").write_bytes(b"damaged")

    found = replayed_drafts(run.settings, "eagle3", run.traces, ALL)

    assert not found.chances and found.num_open
    assert any("version 0 is not replayed" in line for line in caplog.messages)
    assert not replayed_drafts(run.settings, "suffix", run.traces, ALL).chances
    assert not replayed_drafts(run.settings, "eagle3", run.traces, range(1, 9)).num_open


def test_traces_of_another_target_are_not_replayed_with_this_ones_head(tmp_path):
    run = served(tmp_path, Rule.BLOCK, {"temperature": 2.5}, num=6)
    others = [replace(trace, target_fingerprint="ab" * 32) for trace in run.traces]

    with pytest.raises(ValueError, match=r"of target abababababab.*--set target="):
        replayed_drafts(run.settings, "eagle3", others, ALL)

    both = [*run.traces[:3], *others[3:]]
    found = replayed_drafts(run.settings, "eagle3", both, ALL)
    replayed = {seq for _, _, seq, _ in found.chances}
    assert replayed <= {trace.seq for trace in run.traces[:3]} and replayed


def test_the_command_replays_unless_it_is_told_not_to(tmp_path):
    run = served(tmp_path, Rule.BLOCK, {"temperature": 2.5}, num=40)
    limits = TraceLimits(segment_bytes=1 << 22, max_bytes=1 << 26, ttl_s=1e6, sync_interval_s=0.0)
    backend = open_backend(run.settings.buffer.url, run.settings.run_dir)
    with backend.open_trace_writer(limits) as writer:
        for trace in run.traces:
            writer.append(encode_trace(trace))
    words = ["policy", "--ungated", "--method", "ppo"]
    for name in ("target", "run_dir", "device"):
        words += ["--set", f"{name}={getattr(run.settings, name)}"]
    words += ["--set", f"drafter.max_draft={MOST}", "--set", "trainer.device=cpu"]

    replayed = CliRunner().invoke(app, words)
    plain = CliRunner().invoke(app, [*words, "--no-replay"])

    assert replayed.exit_code in (0, 1), replayed.output
    assert "keeps were replayed along the text" in replayed.output
    assert "replayed" not in plain.output

    run_dir = run.settings.run_dir
    kept = read_replayed(run_dir)
    steps, _ = read_steps(run.settings.buffer.url, run_dir, 10_000)
    log = ReplayedLog.of(steps, "eagle3", profile(), MOST)
    assert len(kept) == sum(bool(row.replayed) for step in steps for row in step.rows) > 20
    assert f"{len(kept)} of " in (replays(log) or "")

    assert replayed_path(run_dir).stat().st_mode & 0o777 == 0o600, "it names traces"
    place = next(iter(kept))
    write_replayed(run_dir, {place: (0.25,) * MOST})
    assert read_replayed(run_dir) == {**kept, place: (0.25,) * MOST}
    write_replayed(run_dir, {place: (0.5,) * 3})
    assert read_replayed(run_dir) == {place: (0.5,) * 3}, "others had another number of positions"


@pytest.mark.parametrize("damage", ["junk", "cut", "no probability", "unknown producer"])
def test_a_damaged_file_of_replays_is_named(tmp_path, damage):
    write_replayed(tmp_path, {("a", 1, 2, 3): (0.5, 0.25)})
    path = replayed_path(tmp_path)
    whole = path.read_bytes()
    damaged = {
        "junk": b"junk",
        "cut": whole[:-3],
        "no probability": whole.replace(np.float32(0.25).tobytes(), np.float32(7).tobytes()),
        "unknown producer": whole.replace(b'["a"]'.replace(b'"', b'\\"'), b"[]     "),
    }[damage]
    assert damaged != whole
    path.write_bytes(damaged)

    with pytest.raises(ValueError, match=r"replayed\.safetensors cannot be read .* delete it"):
        read_replayed(tmp_path)
