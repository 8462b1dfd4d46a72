"""A request may choose its drafters: nobody else drafts for it, and outputs do not change."""

from __future__ import annotations

import copy
import random

import pytest

from drafters.suffix.index import SuffixIndex
from drafters.suffix.traits import REQUEST_TRAITS
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.interface import Decision
from serving.capture.rounds import round_columns
from serving.engine.loop import Engine, Listeners

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6][: 3 + i % 6] for i in range(6)]
CHOICES = (
    None,
    frozenset(),
    frozenset({"eagle3"}),
    frozenset({"eagle3", "suffix"}),
    frozenset({"eagle3", "suffix_request"}),
)


class Noting(RandomPolicy):
    """Remembers what it was shown and what it learned."""

    def __init__(self):
        super().__init__()
        self.seen, self.learned = [], []

    def plan(self, obs):
        self.seen.append(obs)
        return super().plan(obs)

    def observe(self, outcome):
        self.learned.append(outcome.decision)


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


@pytest.fixture(scope="module")
def plain(model):
    """Token ids of seeded requests that are answered without drafts."""
    got = run(make_engine(copy.deepcopy(model)), requests_with([None] * 6, max_draft=0))
    return {name: collected.token_ids for name, collected in got.items()}


def request_index():
    return SuffixIndex(2, 8, 0, "suffix_request", REQUEST_TRAITS)


def requests_with(choices, **params):
    return [
        request_of(str(i), prompt, 24, temperature=0.7, seed=i, drafters=choice, **params)
        for i, (prompt, choice) in enumerate(zip(PROMPTS, choices, strict=True))
    ]


def arm_engine(model, *, overlaps=False):
    """An engine whose policies, by choice, note what they see; and those policies, and drafts."""
    policies, drafted = {None: Noting()}, []
    engine = make_engine(copy.deepcopy(model), on_request=(request_index(),), overlaps=overlaps)
    engine = Engine(
        engine.parts,
        policies[None],
        Listeners(on_finished=lambda s: drafted.append((s.request, round_columns(s.rounds)))),
        lambda choice: policies.setdefault(choice, Noting()),
    )
    return engine, policies, drafted


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("overlaps", [False, True])
def test_only_chosen_drafters_draft_and_seeded_outputs_stay(model, plain, choice, overlaps):
    engine, _, drafted = arm_engine(model, overlaps=overlaps)

    got = run(engine, requests_with([choice] * 6))

    allowed = {"eagle3", "suffix"} if choice is None else choice
    used = {one.drafter for _, rounds in drafted for one in rounds if one.draft_ids}
    assert used <= allowed and (used or not allowed)
    assert {name: collected.token_ids for name, collected in got.items()} == plain


def test_mixed_requests_are_drafted_for_by_what_all_allow(model, plain):
    numbers = random.Random(3)
    engine, policies, _ = arm_engine(model)

    got = run(engine, requests_with([numbers.choice(CHOICES) for _ in PROMPTS]))

    for choice, policy in policies.items():
        assert all(set(obs.drafters) <= (choice or {"eagle3", "suffix"}) for obs in policy.seen)
    assert {name: collected.token_ids for name, collected in got.items()} == plain


def test_a_request_that_decodes_plainly_restricts_nobody(model):
    engine, policies, _ = arm_engine(model)
    plain = request_of("plain", PROMPTS[0], 24, max_draft=0, drafters=frozenset())

    run(engine, [plain, request_of("other", PROMPTS[1], 24)])

    assert {obs.drafters for obs in policies[None].seen} == {("eagle3", "suffix")}
    assert list(policies) == [None]


def test_every_arm_has_its_own_policy_for_planning_and_for_learning(model):
    engine, policies, _ = arm_engine(model, overlaps=True)
    alone = frozenset({"eagle3"})

    run(engine, requests_with([alone] * 6))
    run(engine, requests_with([None] * 6))

    assert {obs.drafters for obs in policies[alone].seen} == {("eagle3",)}
    assert {obs.drafters for obs in policies[None].seen} == {("eagle3", "suffix")}
    assert {d.drafter for d in policies[alone].learned} == {"eagle3", "none"}
    assert "suffix" in {d.drafter for d in policies[None].learned}
    assert all(obs.matches is None for obs in policies[alone].seen)


class Follow(RandomPolicy):
    """Drafts with the drafter that needs a match, wherever there is one."""

    def plan(self, obs):
        kind = next((k for k in obs.drafters if k.startswith("suffix")), None)
        k = min(8, obs.max_draft) if kind and any(obs.matches) else 0
        return Decision(kind if k else "none", k, 1.0, False, "test")


def accepted_of_a_repeated_request(model, choice, first_choice=None):
    engine = make_engine(
        copy.deepcopy(model), policy=Follow(), on_request=(request_index(),), prefix_cache=False
    )
    prompt = list(range(20, 40))
    run(engine, [request_of("first", prompt, 30, drafters=first_choice)])
    again = run(engine, [request_of("again", prompt, 30, drafters=choice)])
    return again["again"].last.stats.accepted


def test_the_index_of_the_request_alone_does_not_know_other_requests(model):
    shared = accepted_of_a_repeated_request(model, frozenset({"suffix"}))
    alone = accepted_of_a_repeated_request(model, frozenset({"suffix_request"}))
    unseen = accepted_of_a_repeated_request(
        model, frozenset({"suffix"}), first_choice=frozenset({"suffix_request"})
    )

    assert shared > 20 > alone
    assert unseen == alone, "text of a request that does not allow the index entered it"


def test_drafters_on_request_follow_nobody_who_does_not_name_them(model):
    index = request_index()
    engine = make_engine(copy.deepcopy(model), on_request=(index,))
    followed = []

    run(
        engine,
        [
            request_of("ordinary", PROMPTS[0], 8),
            request_of("named", PROMPTS[1], 8, drafters=frozenset({"suffix_request"})),
        ],
        between=lambda _engine, _step: followed.append(index.num_running),
    )

    assert max(followed) == 1
    assert index.num_running == 0
