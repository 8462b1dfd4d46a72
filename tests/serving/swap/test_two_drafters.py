"""Two drafters that learn in one server: each has its own versions, which are swapped, watched and
rolled back without a change of the other, and traces and metrics tell them apart."""

from __future__ import annotations

import pytest
import torch

from buffer.backends import open_backend
from buffer.folder_weights import FolderWeights
from buffer.traces import TraceReader
from configs.schema import Settings
from drafters.catalog import kind_of
from reporting.records import Figures, Row
from serving.border.in_process import Desk
from serving.build import build_service
from serving.http.metrics import families
from serving.reporting import Reporter
from tests.reporting.kept import Kept
from tests.serving.swap.test_swaps import ask, publish_next, wait_until

MIX = "eagle3+mtp"


def settings_for(target, run_dir, **policy):
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 200, "page_size": 4},
            "drafter": {"max_draft": 3, "beside": [{"kind": "mtp"}], "suffix": {"enabled": False}},
            "policy": policy,
            "swap": {"poll_s": 0.02, "watch_rounds": 96},
        }
    )


def noisy(tensors):
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def service(tiny_target_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    service = build_service(
        settings_for(tiny_target_dir, run_dir, kind="fixed", draft_k=3, drafter="mtp")
    )
    service.start()
    yield service, run_dir
    service.stop()


def versions(service):
    return service.figures().versions


def test_each_drafter_takes_versions_of_its_own_line_alone(service):
    service, run_dir = service
    assert FolderWeights(run_dir / "weights").read(0).manifest.kind == "eagle3"
    assert FolderWeights(run_dir / "weights" / "mtp").read(0).manifest.kind == "mtp"
    before, reports = ask(service, "before"), Kept()
    reporter = Reporter(service, reports)
    eagle = service.engine.drafting.neural["eagle3"].drafter.module
    kept = {name: value.clone() for name, value in eagle.state_dict().items()}

    assert publish_next(run_dir / "weights" / "mtp", noisy) == 1
    wait_until(lambda: versions(service) == {"eagle3": 0, "mtp": 1})
    after = ask(service, "after")

    assert after.token_ids == before.token_ids
    assert (before.last.stats.drafter_version, after.last.stats.drafter_version) == (0, 1)
    assert all(value.equal(kept[name]) for name, value in eagle.state_dict().items())
    status = service.drafter_status()
    assert (status["kind"], status["version"]) == ("eagle3", 0)
    assert [(one["kind"], one["version"]) for one in status["beside"]] == [("mtp", 1)]

    assert publish_next(run_dir / "weights", noisy) == 1
    wait_until(lambda: versions(service) == {"eagle3": 1, "mtp": 1})
    reporter.report()
    figures = {name: value for one in reports.of(Figures) for name, value in one.values.items()}
    assert (figures["server/version"], figures["beside/mtp/server/version"]) == (1, 1)
    swaps = [(row.cells["drafter"], row.cells["version"]) for row in reports.of(Row)]
    assert swaps == [("(first)", 1), ("mtp", 1)]
    desk = Desk(service)
    assert desk.rollback("mtp")["version"] == 0
    assert versions(service) == {"eagle3": 1, "mtp": 0}
    assert service.drafter_status()["beside"][0]["denied"] == [1]
    assert not service.drafter_status()["denied"]
    wait_until(lambda: FolderWeights(run_dir / "weights" / "mtp").read_denied() == {1})
    assert desk.swap(0, None)["version"] == 0
    assert versions(service) == {"eagle3": 0, "mtp": 0}
    reporter.report()
    assert [row.cells["drafter"] for row in reports.of(Row)[2:]].count("mtp") == 1
    assert ask(service, "back").token_ids == before.token_ids
    assert service.figures().swaps == {"swapped": 3, "rejected": 0, "rolled_back": 1}
    with pytest.raises(ValueError, match=r"no drafter 'suffix' learns.*eagle3, mtp"):
        desk.swap(0, "suffix")


def test_metrics_count_by_drafter(service):
    service, _ = service
    ask(service, "counted")
    found = {
        (sample.name, sample.labels["drafter"]): sample.value
        for family in families(service.figures(), "tiny")
        for sample in family.samples
        if "drafter" in sample.labels
    }
    assert found["slipstream:drafter_draft_tokens_total", "mtp"] > 0
    assert ("slipstream:drafter_draft_tokens_total", "eagle3") not in found
    assert ("slipstream:drafter_versions", "eagle3") in found


def test_traces_of_both_hold_the_layers_of_both_and_who_drafted(tiny_target_dir, tmp_path):
    """A mix as the only arm: each request is drafted for by the drafter that keeps more of it."""
    from policies.goodput import GoodputPolicy
    from policies.interface import PolicyContext, StepObs
    from policies.picks import Picker

    class OnlyMixed(GoodputPolicy):
        def plan(self, obs: StepObs):
            from policies.interface import Decision

            k = min(3, obs.max_draft)
            picks = self._picker.pick(obs, MIX, k)
            return Decision(MIX, k, 1.0, False, "test", "goodput", picks=picks)

        def rest(self):
            return None

    traits = {kind: kind_of(kind).traits for kind in ("eagle3", "mtp")}
    context = PolicyContext(traits, 3, 0, {MIX: ("eagle3", "mtp")})
    policy = OnlyMixed(context, explore=0.3, half_life_rounds=200, margin=1.01)
    assert isinstance(policy._picker, Picker)
    settings = settings_for(tiny_target_dir, tmp_path, kind="goodput")
    policy.wants_profile = False
    service = build_service(settings, wrap=lambda _policy: policy)
    service.start()
    try:
        for number in range(2):
            ask(service, str(number), 40)
        wait_until(lambda: service.figures().traces.get("written") == 2)
    finally:
        service.stop()
    traces = TraceReader(open_backend("log:", tmp_path)).read(10)

    mtp, eagle = (
        FolderWeights(tmp_path / "weights" / line).read(0).manifest.drafter_config["layer_ids"]
        for line in ("mtp", "")
    )
    assert len(traces) == 2
    assert all(trace.features.layer_ids == (*eagle, *mtp) for trace in traces)
    rounds = [one for trace in traces for one in trace.rounds if one.draft_ids]
    assert {one.drafter for one in rounds} == {"eagle3", "mtp"}
    assert {one.reason for one in rounds} == {"best", "try"}
    assert all(0 < one.propensity <= 1 for one in rounds)
