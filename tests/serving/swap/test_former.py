"""The former version drafts beside the newest: outputs stay the target's whichever of them drafts,
rounds, watch and rollback count those of the right version, and a restart finds both again."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.folder_weights import FolderWeights
from buffer.traces import TraceReader
from configs.choices import SettingsError
from configs.policies import HedgeSettings
from configs.schema import DrafterSettings, Settings
from drafters.catalog import chosen, former_name, mixes
from drafters.initial import TargetFacts, made_drafter, new_drafter, publish_initial
from drafters.trainable import learning_kinds
from oracles.engines import RandomPolicy
from policies.interface import Decision
from serving.build import build_service
from serving.http.metrics import families
from tests.serving.swap import test_every_kind as every_kind
from tests.serving.swap.test_swaps import ask, noisy, publish_next, wait_until

NEWEST, FORMER = "eagle3", "eagle3:former"
BOTH = f"{NEWEST}+{FORMER}"


@dataclass
class Choosing(RandomPolicy):
    """Drafts with what the test names, any K; notes what it could choose from and was told."""

    wanted: str = FORMER
    seen: Counter = field(default_factory=Counter)
    told: list = field(default_factory=list)

    def plan(self, obs):
        self.seen[obs.drafters] += 1
        kinds = tuple(kind for kind in obs.drafters if self.wanted in (kind, "any"))
        if not kinds:
            kinds = (NEWEST,)
        return super().plan(replace(obs, drafters=kinds))

    def on_swap(self, drafter, version, calibration):
        self.told.append((drafter, version))


def settings_for(target, run_dir, **drafter):
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 3, "max_model_len": 200, "page_size": 4},
            "drafter": {"max_draft": 3, "former": True, "suffix": {"enabled": False}, **drafter},
            "policy": {"kind": "fixed", "draft_k": 3},
            "swap": {"poll_s": 0.02, "watch_rounds": 96, "max_drop": 0.9},
        }
    )


@contextmanager
def serving(target, run_dir, policy, **drafter):
    service = build_service(settings_for(target, run_dir, **drafter), wrap=lambda _: policy)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def versions(service):
    return service.figures().versions


def swapped(service, run_dir, change=noisy):
    """Publish a version and wait until it serves."""
    version = publish_next(run_dir / "weights", change)
    wait_until(lambda: service.drafter_status()["version"] == version)
    return version


def weights(service, kind):
    module = service.engine.drafting.neural[kind].drafter.module
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def test_weights_move_to_the_second_drafter_and_no_output_changes(tiny_target_dir, tmp_path):
    policy = Choosing(wanted="any")
    with serving(tiny_target_dir, tmp_path, policy) as service:
        first = weights(service, NEWEST).clone()
        greedy = ask(service, "greedy", 60).token_ids
        seeded = ask(service, "seeded", 60, temperature=1.0, seed=7, max_draft=0).token_ids
        assert set(policy.seen) == {(NEWEST,)}, "there is no former version yet"
        assert versions(service) == {NEWEST: 0}

        assert swapped(service, tmp_path) == 1
        policy.seen.clear()
        for number in range(3):
            assert ask(service, f"greedy {number}", 60).token_ids == greedy
            again = ask(service, f"seeded {number}", 60, temperature=1.0, seed=7)
            assert again.token_ids == seeded
        assert set(policy.seen) == {(NEWEST, FORMER, BOTH)}
        assert weights(service, FORMER).equal(first)
        assert not weights(service, NEWEST).equal(first)
        second = weights(service, NEWEST).clone()
        assert policy.told[-2:] == [(FORMER, 0), (NEWEST, 1)]

        swapped(service, tmp_path, lambda tensors: tensors)
        assert weights(service, FORMER).equal(second)
        assert versions(service) == {NEWEST: 2, FORMER: 1}
        found = {
            sample.labels["drafter"]: sample.value
            for family in families(service.figures(), "tiny")
            for sample in family.samples
            if sample.name == "slipstream:drafter_versions"
        }
        assert found == {NEWEST: 2, FORMER: 1}
        assert service.figures().drafters[FORMER].rounds > 0
        assert service.figures().policy_failures == 0


def test_traces_name_the_version_that_drafted_also_request_by_request(tiny_target_dir, tmp_path):
    policy = Choosing(wanted=NEWEST)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        ask(service, "before")
        swapped(service, tmp_path)
        for policy.wanted in (NEWEST, FORMER, BOTH):
            answer = ask(service, policy.wanted, 40)
            if policy.wanted == FORMER:
                assert answer.last.stats.drafter_version == 0
        wait_until(lambda: service.figures().traces.get("written") == 4)
    rounds = Counter(
        (one.drafter, one.version)
        for trace in TraceReader(open_backend("log:", tmp_path)).read(10)
        for one in trace.rounds
        if one.draft_ids
    )
    assert set(rounds) == {(NEWEST, 0), (NEWEST, 1), (FORMER, 0)}


def test_former_weights_draft_from_rows_of_their_own(tiny_target_dir, tmp_path):
    """Whatever the slot held before: another version's rows, of cached prompts too, would make it
    look worse than it is."""

    class Longest(Choosing):
        def plan(self, obs):
            kind = self.wanted if self.wanted in obs.drafters else NEWEST
            k = min(3, obs.max_draft)
            return Decision(kind if k else "none", k, 1.0, False, "test")

    prompt = [40 + at % 50 for at in range(80)]
    own = tmp_path / "own"
    with serving(tiny_target_dir, own, Longest(wanted=NEWEST), former=False) as service:
        ask(service, "alone", 80, prompt)
        wait_until(lambda: service.figures().traces.get("written") == 1)
    policy = Longest(wanted=FORMER)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path, noisy)
        swapped(service, tmp_path, lambda tensors: tensors)
        ask(service, "by version 1", 80, prompt)
        policy.wanted = NEWEST
        for number in range(3):
            ask(service, str(number), 80)  # so that the newest version is not given up
        swapped(service, tmp_path, noisy)
        policy.wanted = FORMER
        assert versions(service) == {NEWEST: 3, FORMER: 2}
        ask(service, "by version 2", 80, prompt)  # with the weights of version 0
        wait_until(lambda: service.figures().traces.get("written") == 5)
    drafts = {
        trace.request_id: {
            one.anchor: one.draft_ids for one in trace.rounds if len(one.draft_ids) == 3
        }
        for folder in (own, tmp_path)
        for trace in TraceReader(open_backend("log:", folder)).read(10)
    }
    first, other, again = (drafts[x] for x in ("alone", "by version 1", "by version 2"))
    common = first.keys() & other.keys() & again.keys()
    assert len(common) > 20
    assert all(first[at] == again[at] for at in common)
    assert any(first[at] != other[at] for at in common)


def test_a_version_rolled_back_by_order_drafts_no_more_and_the_next_one_has_a_former(
    tiny_target_dir, tmp_path
):
    policy = Choosing(wanted=FORMER)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path)
        ask(service, "one", 40)
        service.swapper.rollback()
        status = service.drafter_status()
        assert (status["version"], status["former"], status["denied"]) == (0, 1, [1])
        assert not status["drafts_beside"] and versions(service) == {NEWEST: 0}
        policy.seen.clear()
        ask(service, "two", 40)
        assert set(policy.seen) == {(NEWEST,)}

        swapped(service, tmp_path)
        ask(service, "three", 40)
        assert versions(service) == {NEWEST: 2, FORMER: 0}
        assert service.figures().policy_failures == 0


def on_trial(service):
    """As the watch leaves it when version 1 is compared with version 0, which decodes."""
    swapper = service.swapper
    watch = swapper._watch
    watch._state, watch._new, watch._former, watch._version = "trial", 1, 0, 0
    swapper._force.exchange("trial of the former version")
    assert service.drafter_status()["version"] == 0


@pytest.mark.parametrize("former", [True, False])
def test_a_rollback_by_order_in_a_trial_rejects_the_version_on_trial_and_ends_it(
    tiny_target_dir, tmp_path, former
):
    """Else it was the former version that was denied, and none was taken any more."""
    with serving(tiny_target_dir, tmp_path, RandomPolicy(), former=former) as service:
        swapped(service, tmp_path)
        on_trial(service)
        service.swapper.rollback()
        status = service.drafter_status()
        assert (status["version"], status["denied"], status["state"]) == (0, [1], "steady")
        with pytest.raises(ValueError, match=r"no former version .* 1 was rolled back before"):
            service.swapper.rollback()
        assert service.drafter_status()["denied"] == [1]
        assert swapped(service, tmp_path) == 2


def test_a_version_that_is_ordered_in_its_trial_ends_it(tiny_target_dir, tmp_path):
    """Else its steps would be taken for late ones, and the trial would never end."""
    with serving(tiny_target_dir, tmp_path, RandomPolicy()) as service:
        swapped(service, tmp_path)
        on_trial(service)
        service.swapper.swap(1)
        service.swapper.swap(None)
        ask(service, "one", 40)
        status = service.drafter_status()
        assert (status["version"], status["state"]) == (1, "steady")
        assert swapped(service, tmp_path) == 2


def test_a_version_with_the_very_weights_of_the_newest_does_not_draft_beside_it(
    tiny_target_dir, tmp_path
):
    """It has brought a policy alone. To choose between both would cost rows and tell nothing."""
    policy = Choosing(wanted="any")
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path, every_kind.negated)
        swapped(service, tmp_path, every_kind.negated)
        status = service.drafter_status()
        assert (status["former"], status["drafts_beside"]) == (1, False)
        policy.seen.clear()
        ask(service, "one", 40)
        assert set(policy.seen) == {(NEWEST,)} and versions(service) == {NEWEST: 2}
        swapped(service, tmp_path, lambda tensors: tensors)
        assert versions(service) == {NEWEST: 3, FORMER: 2}


def test_weights_that_are_rolled_back_are_denied_under_every_number(tiny_target_dir, tmp_path):
    """A version brought a policy for weights that were left for the former ones. Once it is rolled
    back, a restart would begin with the same weights under their first number."""
    policy = Choosing(wanted=FORMER)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path, every_kind.negated)
        for number in range(4):
            ask(service, str(number), 120)
        for _ in range(2):
            swapped(service, tmp_path, every_kind.negated)
        ask(service, "next", 20)
        assert versions(service) == {NEWEST: 3, FORMER: 0}
        service.swapper.rollback()
        assert service.drafter_status()["denied"] == [1, 2, 3]

    with serving(tiny_target_dir, tmp_path, policy) as service:
        assert service.drafter_status()["version"] == 0


def test_a_bad_version_is_rolled_back_where_both_draft_in_every_step(tiny_target_dir, tmp_path):
    """The watch counts rounds of the version that it judges, whoever else drafts."""
    settings = every_kind.settings_for(tiny_target_dir, tmp_path, NEWEST, "block", None)
    always_mixed = {"kind": "hedge", "guard": False, "hedge": HedgeSettings(mixing=1.0)}
    settings = settings.model_copy(
        update={
            "drafter": settings.drafter.model_copy(update={"former": True}),
            "policy": settings.policy.model_copy(update=always_mixed),
        }
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_target_dir, dtype=torch.float32)
    fingerprint = target_fingerprint(tiny_target_dir)
    facts = TargetFacts(model.config, model.lm_head.weight.detach(), fingerprint)
    manifest, content = made_drafter(NEWEST, facts, new_drafter(settings))
    right = every_kind.made_right(NEWEST, manifest.drafter_config, load(content), model)
    publish_initial(FolderWeights(tmp_path / "weights"), manifest, save(right))
    service = build_service(settings)
    service.start()
    try:
        before = every_kind.ask_all(service)
        swapped(service, tmp_path, every_kind.negated)
        answers = []
        for _ in range(40):
            answers.append(every_kind.ask_all(service))
            if service.figures().swaps["rolled_back"]:
                break
        counts, status = service.figures().drafters, service.drafter_status()
    finally:
        service.stop()
    assert (status["version"], status["denied"]) == (0, [1]), status["history"]
    assert counts[FORMER].rounds > 0 and counts[FORMER].accepted > 0.3 * counts[FORMER].tokens
    for greedy in (0, 3):
        assert {tuple(found[greedy].token_ids) for found in [before, *answers]} == {
            tuple(before[0].token_ids)
        }


def test_a_pinned_version_drafts_alone(tiny_target_dir, tmp_path):
    policy = Choosing(wanted=FORMER)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path)
        service.swapper.swap(1)
        ask(service, "pinned", 40)
        assert versions(service) == {NEWEST: 1}
        service.swapper.swap(None)
        ask(service, "free", 40)
        assert versions(service) == {NEWEST: 1, FORMER: 0}


def test_the_version_that_drafts_stays_when_the_one_it_was_left_for_is_replaced(
    tiny_target_dir, tmp_path
):
    """Otherwise two bad versions in a row would leave no good one."""
    policy = Choosing(wanted=FORMER)
    with serving(tiny_target_dir, tmp_path, policy) as service:
        swapped(service, tmp_path)
        for number in range(4):
            ask(service, str(number), 120)
        swapped(service, tmp_path)
        ask(service, "next", 20)
        assert versions(service) == {NEWEST: 2, FORMER: 0}
        events = [one["event"] for one in service.drafter_status()["history"]]
        assert "given up for 0, which drafted more" in events

        policy.wanted = NEWEST
        for number in range(4):
            ask(service, f"newest {number}", 120)
        swapped(service, tmp_path)
        ask(service, "last", 20)
        assert versions(service) == {NEWEST: 3, FORMER: 2}


def test_a_restart_finds_the_newest_version_and_its_parent(tiny_target_dir, tmp_path):
    with serving(tiny_target_dir, tmp_path, Choosing()) as service:
        want = ask(service, "want", 40).token_ids
        swapped(service, tmp_path)
        swapped(service, tmp_path, lambda tensors: tensors)
        former = weights(service, FORMER).clone()

    with serving(tiny_target_dir, tmp_path, Choosing()) as service:
        wait_until(lambda: versions(service) == {NEWEST: 2, FORMER: 1})
        assert weights(service, FORMER).equal(former)
        assert ask(service, "again", 40).token_ids == want
        assert service.figures().drafters[FORMER].rounds > 0
        assert service.figures().swaps == {"swapped": 0, "rejected": 0, "rolled_back": 0}
        service.swapper.rollback()
        assert service.drafter_status()["version"] == 1

    with serving(tiny_target_dir, tmp_path, Choosing(), former=False) as service:
        assert ask(service, "without", 40).token_ids == want
        assert set(service.engine.drafting.neural) == {NEWEST}


@pytest.mark.parametrize("kind", [kind for kind in learning_kinds() if kind != NEWEST])
def test_any_drafter_that_learns_can_have_one(kind, tiny_target_dir, tmp_path):
    with serving(tiny_target_dir, tmp_path, RandomPolicy(), kind=kind) as service:
        want = ask(service, "want", 40, max_draft=0).token_ids
        swapped(service, tmp_path)
        answers = [ask(service, str(number), 40) for number in range(3)]
        assert [answer.token_ids for answer in answers] == [want] * 3
        assert versions(service) == {kind: 1, former_name(kind): 0}
        counts = service.figures().drafters
        assert counts[kind].rounds > 0 and counts[former_name(kind)].rounds > 0
        assert service.figures().policy_failures == 0


def test_settings_that_leave_nothing_to_choose_are_refused():
    with pytest.raises(SettingsError, match=r"drafter\.former.*'suffix' does not learn"):
        chosen(DrafterSettings(kind="suffix", former=True))
    on_device = DrafterSettings.model_validate(
        {"former": True, "suffix": {"mixed": True, "place": "device"}}
    )
    with pytest.raises(SettingsError, match=r"drafter\.suffix\.mixed on the device"):
        mixes(on_device, on_gpu=False)
    assert mixes(DrafterSettings(former=True), on_gpu=True) == {BOTH: (NEWEST, FORMER)}
