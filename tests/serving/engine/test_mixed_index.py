"""The suffix index and a neural drafter draft in one round, each for some requests: outputs stay
the target's, and a round says who drafted and why."""

from __future__ import annotations

import random

import pytest
import torch

from configs.schema import Settings
from drafters.suffix.index import SuffixIndex
from drafters.suffix.on_device import DeviceIndex
from drafters.suffix.traits import DEVICE_TRAITS
from oracles.engines import RandomPolicy, make_engine, new_weights, random_model, request_of, run
from oracles.joint_law import law_excess
from policies.interface import Decision
from serving.build import build_service
from serving.capture.rounds import round_columns
from serving.engine import mixed_rows
from serving.engine.loop import Engine, Listeners
from specops.matches import Bounds
from specops.verify_logits import Rule
from tests.serving.engine.test_every_drafter import Stubborn
from tests.serving.engine.test_greedy_equality import random_prompts, reference
from tests.serving.engine.test_mixed import Mixing as MixingAny
from tests.serving.engine.test_mixed import few_tokens, scrambled
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    PENALIZED,
    SHAPES,
    V,
    counted,
    expected_law,
    soft_target,
)
from tests.serving.engine.test_sampled_law import PROMPT as LAW_PROMPT
from tests.serving.swap.test_swaps import ask

MIX = "eagle3+suffix"


class Short(SuffixIndex):
    """Proposes one token at most."""

    def propose(self, keys, most):
        return super().propose(keys, [min(k, 1) for k in most])


class Mixing(MixingAny):
    """The mix with the index at every step, any member for each request."""

    def __init__(self, mix=MIX, k=3, seed=0):
        super().__init__(mix, k, seed)


def repeating_prompts(numbers, count, vocab_size):
    """Prompts in which text occurs twice, so that the index has something to propose."""
    prompts = random_prompts(numbers, count, vocab_size)
    return [prompt + prompt[: numbers.randint(1, len(prompt))] for prompt in prompts]


@pytest.mark.parametrize(
    ("kinds", "architecture", "overlaps"),
    [
        (("eagle3",), "qwen3", True),
        (("eagle3",), "llama", False),
        (("dflash", "mtp"), "gemma3", True),
        (("draft_model", "p_eagle"), "qwen2", False),
    ],
)
def test_greedy_output_is_the_targets_with_swaps_in_the_middle(kinds, architecture, overlaps):
    numbers = random.Random(3)
    model = random_model(architecture)
    prompts = repeating_prompts(numbers, 6, 96)
    expected = [reference(model, prompt, 18) for prompt in prompts]
    engine = make_engine(
        model, kind=kinds[0], beside=dict.fromkeys(kinds[1:]), mixes_index=True, overlaps=overlaps,
        max_batch=3, prefill_chunk=16, page_size=4, policy=RandomPolicy(random.Random(5)),
    )  # fmt: skip
    requests = [
        request_of(str(i), p, 18, max_draft=numbers.choice((None, 2)))
        for i, p in enumerate(prompts)
    ]

    got = run(engine, requests, scrambled)

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    used = {drafter for drafter, _ in engine.figures().steps_by_arm}
    assert used >= {*kinds, "suffix", "+".join((*kinds, "suffix"))}
    assert engine.figures().drafters["suffix"].tokens > 0


def counts_of(engine, shape, num_samples=700):
    requests = [
        request_of(str(i), LAW_PROMPT, LENGTH + 1, capture=False, **shape)
        for i in range(num_samples)
    ]
    return counted(run(engine, requests))


def law_engine(regime="opposed", **values):
    """An engine whose index proposes wrong tokens as often as right ones."""
    engine = make_engine(
        soft_target(regime), **{"kind": "eagle3", "policy": Mixing()} | values, mixes_index=True,
        max_batch=256, num_pages=1200, prefill_chunk=1024, ring_rows=8192, max_draft=3,
    )  # fmt: skip
    engine.drafting.hosts["suffix"].__class__ = Stubborn
    return engine


@pytest.mark.parametrize(
    ("shape", "rule", "is_reduced", "overlaps"),
    [
        (SHAPES["whole"], Rule.BLOCK, False, True),
        (SHAPES["truncated"], Rule.STANDARD, True, False),
        (PENALIZED, Rule.BLOCK, True, True),
    ],
    ids=["whole", "truncated", "penalized"],
)
def test_the_joint_law_of_a_mixed_batch_is_the_targets(shape, rule, is_reduced, overlaps):
    """Also where the neural drafter cannot say what the index proposes."""
    law = expected_law(soft_target("opposed"), shape)
    weights = few_tokens("eagle3", soft_target("opposed"), [0, 2, 3, 5, 7]) if is_reduced else None
    engine = law_engine(weights=weights, rule=rule, overlaps=overlaps)

    counts = counts_of(engine, shape)

    by_drafter = engine.figures().drafters
    assert all(by_drafter[kind].tokens > 200 for kind in ("eagle3", "suffix"))
    assert 0 < by_drafter["suffix"].accepted < by_drafter["suffix"].tokens
    assert law_excess(counts, law) < 1


def neural_law_for_all(law, logq_RK, certain_RK):
    """Mutant: what the index proposes, verified as if the neural drafter had drawn it."""
    return law, logq_RK


def certain_for_another_request(law, logq_RK, certain_RK):
    """Mutant: the tokens of the request before are certain."""
    return certain_at(law, logq_RK, certain_RK.roll(1, 0))


certain_at = mixed_rows.certain_at


@pytest.mark.parametrize("mutant", [neural_law_for_all, certain_for_another_request])
def test_a_law_of_the_drafter_that_was_not_picked_is_seen(monkeypatch, mutant):
    monkeypatch.setattr(mixed_rows, "certain_at", mutant)

    counts = counts_of(law_engine(), SHAPES["whole"])

    assert law_excess(counts, expected_law(soft_target("opposed"), SHAPES["whole"])) > 1


def test_seeded_answers_do_not_depend_on_who_drafts():
    answers = []
    for policy in (Mixing(seed=1), Mixing(seed=2), Mixing("eagle3")):
        engine = make_engine(
            random_model("qwen3"), kind="eagle3", mixes_index=True, policy=policy, max_batch=4
        )
        prompts = repeating_prompts(random.Random(4), 4, 96)
        got = run(
            engine,
            [request_of(str(i), p, 20, temperature=0.9, seed=7 + i) for i, p in enumerate(prompts)],
        )
        answers.append([got[str(i)].token_ids for i in range(len(prompts))])
    assert answers[0] == answers[1] == answers[2]


def rounds_of(policy, index=SuffixIndex, **params):
    """(request, anchor) -> round, of a target with few tokens, whose text repeats itself."""
    found = {}

    def keep(sequence):
        for one in round_columns(sequence.rounds):
            found[sequence.request.id, one.anchor] = one

    model = soft_target("opposed")
    engine = make_engine(
        model, kind="eagle3", weights=new_weights("eagle3", model), mixes_index=True, policy=policy
    )
    engine.drafting.neural["eagle3"].drafter.version = 3
    engine.drafting.hosts["suffix"].__class__ = index
    engine = Engine(engine.parts, policy, Listeners(on_finished=keep))
    prompts = repeating_prompts(random.Random(6), 4, V)
    run(engine, [request_of(str(i), p, 40, **params) for i, p in enumerate(prompts)])
    return found


def test_every_round_says_who_drafted_with_which_version_and_why():
    found = rounds_of(Mixing(), temperature=1.0).values()
    drafted = [one for one in found if len(one.draft_ids)]

    assert {one.drafter for one in drafted} == {"eagle3", "suffix"}
    assert {one.version for one in found} == {3}
    assert {one.propensity for one in drafted} == {0.25}
    assert {one.reason for one in drafted if one.drafter == "suffix"} == {"try"}
    assert {one.reason for one in drafted if one.drafter == "eagle3"} == {"try", "unmatched"}
    for one in drafted:
        assert len(one.q_logp or ()) == (0 if one.drafter == "suffix" else len(one.draft_ids))


def test_the_index_and_the_neural_drafter_draft_in_a_mix_what_they_draft_alone():
    mixed = rounds_of(Mixing())
    for kind in ("eagle3", "suffix"):
        alone = rounds_of(Mixing(kind))
        common = [
            at
            for at in mixed.keys() & alone.keys()
            if mixed[at].drafter == alone[at].drafter == kind
        ]
        assert len(common) > 10
        assert all(mixed[at].draft_ids == alone[at].draft_ids for at in common)


def test_a_round_verifies_as_many_tokens_of_the_index_as_it_proposed():
    found = rounds_of(Mixing(), Short).values()

    lens = {(one.drafter, len(one.draft_ids)) for one in found if len(one.draft_ids)}
    assert {("suffix", 1), ("eagle3", 3)} <= lens
    assert max(num for drafter, num in lens if drafter == "suffix") == 1


def test_a_mix_with_the_index_is_offered_where_somebody_looked():
    seen = []

    class Watching(Mixing):
        looks = True

        def wants_matches(self):
            self.looks = not self.looks
            return self.looks

        def plan(self, obs):
            seen.append((obs.matches is not None, MIX in obs.drafters, "eagle3" in obs.drafters))
            return Decision("eagle3", 2, 1.0, False, "test", "mixing")

    engine = make_engine(random_model("qwen3"), kind="eagle3", mixes_index=True, policy=Watching())
    run(engine, [request_of("0", [1, 2, 3, 1, 2, 3, 1], 10)])

    assert set(seen) == {(True, True, True), (False, False, True)}


@pytest.mark.parametrize("is_text", [False, True], ids=["on the host", "on the device"])
def test_tokens_of_an_index_are_certain_in_the_law_of_the_neural_drafter(is_text):
    """No logits are copied, and log q of what the index proposes is 0."""
    texts = (DeviceIndex("suffix", DEVICE_TRAITS, Bounds(2, 8), 0, torch.device("cpu")),)
    model = soft_target("opposed")
    engine = make_engine(
        model, kind="eagle3", policy=Mixing(), mixes_index=True, max_batch=8,
        **({"texts": texts} if is_text else {}),
    )  # fmt: skip
    mix = engine.drafting.mixes[MIX]
    by_neural, by_mix = told(mix.members[0]), told(mix)
    prompts = repeating_prompts(random.Random(6), 8, V)

    run(engine, [request_of(str(i), p, 30, temperature=0.8) for i, p in enumerate(prompts)])

    assert len(by_mix) == len(by_neural) > 10
    certain = torch.cat([mixed.law.certain_RK.flatten() for mixed in by_mix])
    assert certain.any() and not certain.all()
    for mixed, neural in zip(by_mix, by_neural, strict=True):
        is_certain = mixed.law.certain_RK
        assert mixed.law.logits_RKD is neural.law.logits_RKD and mixed.law.laws is neural.law.laws
        assert not mixed.logq_RK[is_certain].any()
        assert torch.equal(mixed.logq_RK[~is_certain], neural.logq_RK[~is_certain])
        assert torch.equal(mixed.tokens_RK[~is_certain], neural.tokens_RK[~is_certain])
    if not is_text:  # else it has drafted after these tokens
        neural_logq = torch.cat([neural.logq_RK.flatten() for neural in by_neural])
        assert (neural_logq[certain] < 0).any()


def told(rows):
    """The drafts with a law that these rows draft from now on."""
    found, draft = [], rows.draft

    def noting(*arguments, **options):
        drafts = draft(*arguments, **options)
        found.extend([drafts] if drafts.law is not None else [])
        return drafts

    rows.draft = noting
    return found


def test_a_server_mixes_if_settings_say_so(tiny_target_dir, tmp_path):
    """With the default policy and its profile of step times."""
    settings = Settings.model_validate(
        {
            "target": str(tiny_target_dir),
            "run_dir": tmp_path,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 200, "page_size": 4},
            "drafter": {"max_draft": 3, "suffix": {"mixed": True}},
        }
    )
    service = build_service(settings)
    assert set(service.engine.drafting.mixes) == {MIX}
    service.start()
    try:
        prompt = [5, 6, 7, 8] * 8
        plain = ask(service, "plain", prompt=prompt, max_draft=0).token_ids
        answers = [ask(service, f"{n}", prompt=prompt).token_ids for n in range(3)]
    finally:
        service.stop()
    assert answers == [plain] * 3
