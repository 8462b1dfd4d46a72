"""A new policy takes one file and one line in the catalog; settings then select it."""

from __future__ import annotations

import json

from oracles.one_line import run_in, with_addition
from policies.catalog import CATALOG

ALTERNATING = '''
"""Drafters take turns at K = policy.draft_k; one whose weights have changed comes last."""

from typing import NamedTuple

from policies.fixed import PLAIN
from policies.interface import Decision


class Turn(NamedTuple):
    drafter: str
    number: int

    def columns(self):
        return {"turn": self.number}


class AlternatingPolicy:
    wants_profile = True

    def __init__(self, draft_k, context):
        self._draft_k = min(draft_k, context.max_draft)
        self._turns = list(context.drafters)
        self._accepted = dict.fromkeys(self._turns, 0)

    @classmethod
    def from_settings(cls, settings, context):
        return cls(settings.draft_k, context)

    def calibrate(self, samples):
        times = {kind: [s.step_s for s in samples if s.drafter == kind] for kind in self._turns}
        self._turns.sort(key=lambda kind: min(times[kind], default=0.0))

    def rest(self):
        return None

    def wants_matches(self):
        return False

    def plan(self, obs):
        ready = [kind for kind in self._turns if kind in obs.drafters]
        k = min(self._draft_k, max(obs.caps))
        if not ready or k == 0:
            return PLAIN
        turn = Turn(ready[obs.step % len(ready)], obs.step)
        return Decision(turn.drafter, k, 1.0, False, "turn", "alternating", note=turn)

    def observe(self, outcome):
        if isinstance(turn := outcome.decision.note, Turn):
            self._accepted[turn.drafter] += sum(outcome.rows.num_accepted)

    def on_swap(self, drafter, version, calibration):
        self._turns.sort(key=lambda kind: kind == drafter)

    def figures(self):
        return {"kind": "alternating", "accepted": self._accepted}
'''
LINE = '    "alternating": "policies.alternating:AlternatingPolicy",'

PLAY = """
import json, sys
from dataclasses import dataclass
from pathlib import Path

import policies
from configs.load import load_settings
from policies.catalog import build_policy
from policies.interface import CostSample, Outcome, RowOutcomes, StepObs

assert Path(policies.__file__).is_relative_to(Path.cwd()), policies.__file__

@dataclass(frozen=True)
class Traits:
    on_device: bool = True
    needs_match: bool = False
    picks_itself: bool = False
    prior_acceptance: tuple[float, ...] = (0.6,)
    prior_draft_cost: float = 0.08
    former_of: str | None = None

kinds = ("slow", "fast")
settings = load_settings((), sys.argv[1:], {})
policy = build_policy(settings.policy, dict.fromkeys(kinds, Traits()), settings.seed, 8)
policy.calibrate([CostSample("slow", 3, 1, 0.02, 0.01), CostSample("fast", 3, 1, 0.01, 0.001)])
arms, turns = [], []
for step in range(6):
    decision = policy.rest() or policy.plan(StepObs(step, 1, bytes((8,)), None, kinds, 8, 0))
    arms.append([decision.drafter, decision.draft_k])
    turns.append(decision.columns().get("turn"))
    policy.observe(Outcome(decision, 1, RowOutcomes((3,), (2,), (0,)), 0.01, 0.001, False, 0))
    if step == 3:
        policy.on_swap("fast", 1, {})
print(json.dumps({"arms": arms, "turns": turns, "figures": policy.figures()}))
"""


def test_a_policy_is_one_file_and_one_catalog_line(tmp_path):
    root = with_addition(
        tmp_path,
        "policies/alternating.py",
        ALTERNATING,
        "policies/catalog.py",
        LINE,
        after='    "fixed": ',
    )

    done = run_in(root, PLAY, "policy.kind=alternating", "policy.draft_k=3", "policy.guard=false")

    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)
    assert played["arms"] == [
        [kind, 3] for kind in ("fast", "slow", "fast", "slow", "slow", "fast")
    ]
    assert played["figures"] == {"kind": "alternating", "accepted": {"slow": 6, "fast": 6}}
    assert played["turns"] == [0, 1, 2, 3, 4, 5]


def test_a_new_policy_is_guarded_unless_settings_or_its_class_say_otherwise(tmp_path):
    """Nothing has told what a plain step takes, so the first steps are plain."""
    root = with_addition(
        tmp_path,
        "policies/alternating.py",
        ALTERNATING,
        "policies/catalog.py",
        LINE,
        after='    "fixed": ',
    )

    done = run_in(root, PLAY, "policy.kind=alternating", "policy.draft_k=3")

    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)
    assert played["arms"][:3] == [["none", 0]] * 3
    assert played["figures"].keys() == {"kind", "accepted", "guard"}


def test_without_its_line_the_policy_is_unknown(tmp_path):
    root = with_addition(
        tmp_path,
        "policies/alternating.py",
        ALTERNATING,
        "policies/catalog.py",
        "# no line",
        after='    "fixed": ',
    )

    done = run_in(root, PLAY, "policy.kind=alternating")

    assert done.returncode == 1
    known = ", ".join(sorted(CATALOG))
    assert f"policy.kind 'alternating' is unknown; known: {known}" in done.stderr
