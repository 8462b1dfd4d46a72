"""A trainer fits the draft policy beside its drafter, and publishes what beats the one in force."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Trace
from buffer.weights_store import SupersededError
from configs.policies import LtdSettings
from configs.schema import DrafterSettings, Settings
from policies.features import NUM_FEATURES
from policies.network import Network
from policies.published import Origin
from policies.weight_file import text_of
from tests.policies.confident_logs import confident_log
from tests.policies.logs import DRAFTER, MAX_DRAFT, always, any_k, log, profile, traces_of
from tests.trainer.conftest import World
from tests.trainer.test_loop import build, events, status
from tests.trainer.traffic import settings_for, write_traces
from trainer.fits import FittingProcess, Plan, plan_of
from trainer.fitted_policy import policy_path
from trainer.fitting import FITS, NotYetError, Request, fit
from trainer.loop import Trainer, run
from trainer.ltd import FullInformation
from trainer.recent import RecentTrace, RecentTraces
from trainer.watch import log_lines, status_of

EASY, HARD = (0.92,) * MAX_DRAFT, (0.25,) * MAX_DRAFT
QUICK = FullInformation(epochs=120, rounds=3, passes=20)
COARSE = FullInformation(epochs=80, rounds=2, passes=15)


def moods(at):
    """Text that is easy for 100 steps and hard for the next 100."""
    return EASY if (at // 100) % 2 else HARD


def served(steps, fingerprint="ab" * 32):
    return [replace(one, target_fingerprint=fingerprint) for one in traces_of(steps)]


def enough(world: World) -> list[Trace]:
    """Traces of the fewest steps to which a network is fitted that passes."""
    return served(log(1280, any_k, (1,), moods), world.fingerprint)


def network(k: int, drafter: str = DRAFTER, max_draft: int = MAX_DRAFT) -> bytes:
    """Always plays this K."""
    blank = Network(
        np.zeros(NUM_FEATURES, np.float32), np.ones(NUM_FEATURES, np.float32),
        np.zeros((4, NUM_FEATURES), np.float32), np.zeros(4, np.float32),
        np.zeros((max_draft + 1, 4), np.float32), np.eye(max_draft + 1, dtype=np.float32)[k],
    )  # fmt: skip
    return blank.to_bytes(Origin(drafter, 0, 0).metadata())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder with a profile of step times."""
    folder = tmp_path / "run"
    folder.mkdir()
    samples = [{name: getattr(one, name) for name in one.__dataclass_fields__} for one in profile()]
    (folder / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))
    return folder


def request_for(run_dir: Path, in_force: bytes | None = None, **values: Any) -> Request:
    return Request(
        **{
            "kind": "ltd", "drafter": DRAFTER, "run_dir": str(run_dir), "max_draft": MAX_DRAFT,
            "seed": 0, "held_out": 0.25, "least_steps": 1000, "most_steps": 20_000,
            "margin": 1.005, "in_force": None if in_force is None else text_of(in_force),
            "how": QUICK, **values,
        }
    )  # fmt: skip


# ---- what is fitted, and by what it is judged ----------------------------------------------------


def test_a_network_must_beat_the_policy_that_served_and_the_best_fixed_k(run_dir: Path) -> None:
    found = fit(request_for(run_dir), served(log(2560, any_k, (1,), moods)))

    assert found.passed and found.gain > found.low > 0, found.lines
    assert "over the policy in force" in found.lines[0]
    assert "over the best fixed K of each load" in found.lines[1]
    assert Origin.of_blob(found.network) == found.origin == Origin(DRAFTER, 0, 0)

    again = fit(request_for(run_dir, found.network), served(log(2560, any_k, (1,), moods)))
    assert not again.passed, "it is no better than the very network that is in force"
    assert again.lines[0].startswith("gate failed") and "the network in force" in again.lines[0]


@pytest.mark.parametrize("margin", [1.5, 3.0])
def test_a_gain_that_is_not_worth_a_version_is_refused(run_dir: Path, margin: float) -> None:
    request = request_for(run_dir, network(0), margin=margin, how=COARSE)
    found = fit(request, served(log(1280, any_k, (1,), moods)))

    assert 0.5 < found.low < found.gain < 2
    assert found.passed is (margin == 1.5)
    is_told = found.lines[-1] == "less than the +200.00 % of trainer.gate_margin"
    assert is_told is not found.passed


def test_only_steps_of_versions_that_draft_like_the_newest_judge(run_dir: Path) -> None:
    """Former ones may teach."""
    steps = log(2600, any_k, (1,), lambda at: moods(at) if at < 1400 else (0.5,) * MAX_DRAFT)
    steps = [replace(one, version=int(at >= 1400)) for at, one in enumerate(steps)]

    found = fit(request_for(run_dir, least_steps=2000, how=COARSE), served(steps))

    assert (found.origin.oldest, found.origin.newest) == (0, 1)
    assert 256 <= found.num_judged <= 330, "a quarter of 1,200, in stretches of 64"
    assert not found.passed, "the newest version's text is all alike, so there is nothing to learn"


def test_too_few_steps_of_the_newest_version_are_waited_for(run_dir: Path) -> None:
    steps = log(2400, any_k, (1,), lambda at: EASY if at < 2200 else HARD)
    steps = [replace(one, version=int(at >= 2200)) for at, one in enumerate(steps)]

    with pytest.raises(
        NotYetError, match=r"1024 steps of version 1 of eagle3, .* there are (199|200)"
    ):
        fit(request_for(run_dir, least_steps=2000), served(steps))


def test_traces_without_figures_of_confidence_fit_no_head(run_dir: Path) -> None:
    with pytest.raises(NotYetError, match="0 positions with figures of confidence"):
        fit(request_for(run_dir, kind="specdecpp"), served(log(1200, any_k, (1,))))


def test_a_head_must_beat_the_place_and_then_the_head_in_force(run_dir: Path) -> None:
    request = request_for(run_dir, kind="specdecpp", least_steps=300)
    found = fit(request, served(confident_log(400)))

    assert found.passed and "their place alone" in found.lines[0], found.lines
    again = fit(replace(request, in_force=text_of(found.network)), served(confident_log(400)))
    assert not again.passed and "the network in force" in again.lines[0]


# ---- what is kept for it -------------------------------------------------------------------------


def test_the_traces_of_late_are_kept_without_rows_and_bounded(world: World) -> None:
    own = [RecentTrace.of(one, DRAFTER) for one in served(log(400, any_k, (1,)))]
    rich = RecentTrace.of(world.traces[0], DRAFTER)
    assert len(rich.record) < len(encode_trace(world.traces[0])) / 4
    recent = RecentTraces(200)
    for one in own:
        recent.add(one)

    assert recent.records() == [one.record for one in own[-4:]]
    assert recent.num_drafted == round(sum(one.drafted[0] for one in own[-4:]))
    assert recent.total == 400
    recent.forget(lambda owner: owner.finished_unix_ms >= 300)
    assert recent.records() == [one.record for one in own[-4:-2]] and recent.total == 400


def test_a_step_of_a_batch_is_counted_once() -> None:
    recent = RecentTraces(10_000)
    for one in served(log(400, always(3), (8,))):
        recent.add(RecentTrace.of(one, DRAFTER))
    assert recent.num_drafted == 400


@pytest.mark.parametrize(
    ("own", "policy", "wanted"),
    [
        ("auto", "ltd", "ltd"),
        ("auto", "specdecpp", "specdecpp"),
        ("auto", "goodput", None),
        ("none", "ltd", None),
        ("ltd", "goodput", "ltd"),
    ],
)
def test_what_is_fitted_follows_the_policy_that_serves(own, policy, wanted) -> None:
    settings = Settings.model_validate(
        {"policy": {"kind": policy}, "trainer": {"policy": {"kind": own}}}
    )
    from_file = settings.policy.model_copy(update={"ltd": LtdSettings(weights=Path("x"))})
    if policy == "ltd":  # servers take nothing that is published then
        assert plan_of(settings.model_copy(update={"policy": from_file}), "") is None
    plan = plan_of(settings, "")
    assert (None if plan is None else plan.kind) == wanted
    assert plan is None or plan.kind in FITS


def test_of_several_drafters_the_one_that_the_policy_drafts_with_is_fitted_to() -> None:
    beside = {"kind": "eagle3", "beside": [{"kind": "mtp"}]}
    for wanted, is_first in (("eagle3", True), ("mtp", False), ("draft_model", True)):
        settings = Settings.model_validate(
            {"policy": {"kind": "ltd", "drafter": wanted}, "drafter": beside}
        )
        own = settings.model_copy(update={"drafter": DrafterSettings(kind="mtp")})
        assert (plan_of(settings, "") is not None) is is_first
        assert (plan_of(own, "mtp") is not None) is (wanted == "mtp")


# ---- in the loop ---------------------------------------------------------------------------------


def fitting(run_dir: Path, world: World, **values: Any) -> Settings:
    """Settings of a trainer that fits as soon as it can, and whose drafter rests."""
    policy = {"kind": "ltd", "least_steps": 1000, "wait_s": 0.0, **values}
    settings = settings_for(run_dir, world.target, min_traces=10_000, policy=policy)
    return settings.model_copy(
        update={"drafter": DrafterSettings(kind=DRAFTER, max_draft=MAX_DRAFT)}
    )


def run_until(trainer: Trainer, is_there: Callable[[], bool], seconds: float = 240.0) -> None:
    """Run a trainer on a thread, until something is there; then stop it."""
    problem: list[BaseException] = []

    def work() -> None:
        try:
            run(trainer)
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + seconds
    try:
        while not is_there():
            assert thread.is_alive() and time.monotonic() < end, problem or "waited too long"
            time.sleep(0.05)
    finally:
        trainer.stop.set()
        thread.join()
    assert not problem, problem


def children() -> set[int]:
    """Processes that this one has started and that live."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(OSError):  # the thread has ended meanwhile
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.fixture
def no_child_stays() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def test_a_resting_drafter_gets_a_version_with_its_weights_and_the_network(
    run_dir: Path, world: World, no_child_stays: None
) -> None:
    write_traces(run_dir, enough(world))
    store = FolderWeights(run_dir / "weights")
    trainer = build(fitting(run_dir, world))

    run_until(trainer, lambda: store.versions() == [0, 1])

    first, second = store.read_manifest(0), store.read_manifest(1)
    assert second.files[TENSORS] == first.files[TENSORS] and second.parent == 0
    carried = base64.b64decode(second.policy["ltd"])
    assert carried == policy_path(run_dir).read_bytes()
    assert Origin.of_blob(carried) == Origin(DRAFTER, 0, 0)
    [gate] = events(run_dir, "policy_gate")
    assert gate["passed"] and gate["at_least"] > 0 and "gate passed" in gate["text"]
    [told] = events(run_dir, "policy_published")
    assert (told["version"], told["parent"]) == (1, 0)
    shown = status(run_dir)["policy"]
    assert shown["fits"] == {"passed": 1} and not shown["unpublished"]
    assert trainer.published.version == 1

    num_waits = len(events(run_dir, "policy_waits"))
    again = build(fitting(run_dir, world))  # what the newest version carries is not published again
    run_until(again, lambda: len(events(run_dir, "policy_waits")) > num_waits)
    assert store.versions() == [0, 1]


def test_too_few_steps_are_one_line_and_the_status_counts(run_dir: Path, world: World) -> None:
    write_traces(run_dir, served(log(400, any_k, (1,)), world.fingerprint))
    trainer = build(fitting(run_dir, world))

    run_until(trainer, lambda: trainer.intake.counts.read == 8)

    [waits] = events(run_dir, "policy_waits")  # however the number changes
    assert re.match(r"the policy ltd waits for \d+ more steps drafted by eagle3", waits["text"])
    recent, shown = trainer.intake.recent, status(run_dir)["policy"]
    assert recent is not None and 300 < recent.num_drafted == shown["steps"] < 400
    left = 1000 - recent.num_drafted
    assert shown["state"].startswith(f"waits for {left} more steps drafted by eagle3")
    assert not policy_path(run_dir).exists()
    [line] = [one for one in status_of(run_dir).to_lines() if one.startswith("policy")]
    assert f"ltd waits for {left} more steps" in line and "fits: none yet" in line
    assert any("the policy ltd waits for" in one for one in log_lines(run_dir, follow=False))


def test_a_network_comes_with_the_next_version_of_a_drafter_that_learns(
    run_dir: Path, world: World
) -> None:
    write_traces(run_dir, world.traces)
    settings = settings_for(
        run_dir, world.target, max_steps=20, gate_confidence=0.5,
        policy={"kind": "ltd", "wait_s": 1000.0},
    )  # fmt: skip
    trainer = build(settings)
    trainer.publisher.fits.keep(network(3))

    run(trainer)

    store = FolderWeights(run_dir / "weights")
    assert store.read_manifest(1).files[TENSORS] != store.read_manifest(0).files[TENSORS]
    assert base64.b64decode(store.read_manifest(1).policy["ltd"]) == network(3)
    assert not events(run_dir, "policy_published")


def test_a_network_that_was_fitted_to_another_drafter_is_not_carried(
    run_dir: Path, world: World
) -> None:
    write_traces(run_dir, world.traces)
    policy_path(run_dir).parent.mkdir()
    policy_path(run_dir).write_bytes(network(3, "another"))

    settings = settings_for(run_dir, world.target, max_steps=20, gate_confidence=0.5)
    run(build(settings))

    assert "ltd" not in FolderWeights(run_dir / "weights").read_manifest(1).policy


def test_a_version_that_brought_a_policy_alone_and_was_rolled_back_costs_no_learning(
    run_dir: Path, world: World
) -> None:
    trainer = build(fitting(run_dir, world))
    trainer.publisher.fits.keep(network(3))
    store = FolderWeights(run_dir / "weights")
    run_until(trainer, lambda: trainer.published.version == 1)
    trainer = build(fitting(run_dir, world))
    trainer.publisher.fits.keep(network(4))
    run_until(trainer, lambda: trainer.published.version == 2)

    trainer = build(fitting(run_dir, world))
    store.write_denied([2])
    with_learnt = next(iter(trainer.learner.model.parameters()))
    with_learnt.data += 1
    learnt = with_learnt.detach().clone()
    trainer.follow_roll_back()

    assert trainer.published.version == 1
    assert next(iter(trainer.learner.model.parameters())).equal(learnt)
    assert policy_path(run_dir).read_bytes() == network(3)
    assert policy_path(run_dir).with_suffix(".rolled_back").read_bytes() == network(4)
    [told] = events(run_dir, "policy_rolled_back")
    assert (told["version"], told["rejected"]) == (1, 2)
    assert not events(run_dir, "rolled_back")


def test_a_network_that_cannot_be_kept_is_told_and_nothing_half_is_there(
    run_dir: Path, world: World
) -> None:
    (run_dir / "policy").write_text("a file where the folder should be")
    write_traces(run_dir, enough(world))
    trainer = build(fitting(run_dir, world))

    run_until(trainer, lambda: events(run_dir, "policy_gate") != [])

    [gate] = events(run_dir, "policy_gate")
    assert gate["passed"] and not gate["kept"] and "cannot be kept" in gate["text"]
    assert status(run_dir)["policy"]["fits"] == {"failed": 1}
    assert FolderWeights(run_dir / "weights").versions() == [0]


def test_after_a_restart_the_traces_that_are_held_are_fitted_to_as_well(
    run_dir: Path, world: World
) -> None:
    write_traces(run_dir, world.traces)
    learns = settings_for(
        run_dir, world.target, max_steps=3, policy={"kind": "ltd", "least_steps": 1000}
    )
    first = build(learns)
    run(first)

    again = build(learns)

    assert first.intake.recent is not None and again.intake.recent is not None
    assert first.intake.recent.num_drafted == again.intake.recent.num_drafted == len(world.traces)


def test_a_trainer_that_was_superseded_publishes_no_policy(run_dir: Path, world: World) -> None:
    trainer = build(fitting(run_dir, world))
    trainer.publisher.fits.keep(network(3))
    store = FolderWeights(run_dir / "weights")
    store.take_over()

    with pytest.raises(SupersededError, match="another trainer took over"):
        run(trainer)

    assert store.versions() == [0]


def test_a_deleted_tenants_traces_are_fitted_to_no_more(run_dir: Path, world: World) -> None:
    write_traces(run_dir, served(log(400, any_k, (1,)), world.fingerprint))
    trainer = build(fitting(run_dir, world))
    trainer.intake.start()
    while trainer.intake.counts.read < 8:
        trainer.take_in_traces()
    recent = trainer.intake.recent
    assert recent is not None and recent.num_drafted > 0

    open_backend("log:", run_dir).delete("default")
    end = time.monotonic() + 30
    while recent.num_drafted:
        assert time.monotonic() < end
        trainer.take_in_traces()
    trainer.intake.close()


def test_a_process_that_is_killed_is_told_and_publishes_nothing(
    run_dir: Path, world: World, no_child_stays: None
) -> None:
    write_traces(run_dir, enough(world))
    trainer = build(fitting(run_dir, world))
    before = children()

    def kill() -> bool:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        return events(run_dir, "policy_failed") != []

    run_until(trainer, kill)

    [told] = events(run_dir, "policy_failed")
    assert "was ended by signal 9" in told["text"]
    assert not policy_path(run_dir).exists()
    assert FolderWeights(run_dir / "weights").versions() == [0]


def test_what_keeps_it_from_fitting_is_told(run_dir: Path) -> None:
    (run_dir / "step_times.json").write_text("no profile")
    records = [bytes(encode_trace(one)) for one in served(log(1200, any_k, (1,)))]
    for given, error, said in (
        (records, ValueError, "step_times.json is no profile"),
        (records[:4], NotYetError, "1024 steps of version 0 .* there are 200"),
    ):
        process = FittingProcess(request_for(run_dir), given)
        while not process.is_over:
            time.sleep(0.05)
        with pytest.raises(error, match=said):
            process.answer()
        process.end()
        (run_dir / "step_times.json").unlink(missing_ok=True)


def test_the_process_ends_with_whoever_started_it(run_dir: Path) -> None:
    records = [bytes(encode_trace(one)) for one in served(log(2560, any_k, (1,), moods))]
    process = FittingProcess(request_for(run_dir), records)
    os.close(process._lifeline)  # as when the trainer was killed
    process._lifeline = os.open(os.devnull, os.O_RDONLY)
    end = time.monotonic() + 120
    while not process.is_over:
        assert time.monotonic() < end
        time.sleep(0.05)
    with pytest.raises(ValueError, match="ended with exit code 1"):
        process.answer()
    process.end()


def test_it_yields_to_everything_else(run_dir: Path) -> None:
    process = FittingProcess(request_for(run_dir), [])
    try:
        pid, end = process._process.pid, time.monotonic() + 60
        while os.getpriority(os.PRIO_PROCESS, pid) != 19:
            assert time.monotonic() < end and process._process.poll() is None
            time.sleep(0.02)
    finally:
        process.end()


def test_a_plan_says_what_is_in_force(run_dir: Path, world: World) -> None:
    trainer = build(fitting(run_dir, world))
    plan = trainer.publisher.fits.plan
    assert isinstance(plan, Plan)
    assert plan.request(trainer.published).in_force is None
    for refused in ("no base64", 7, text_of(network(3, "another"))):
        damaged = replace(trainer.published, policy={"ltd": refused})
        assert plan.request(damaged).in_force is None, "servers do not take it either"
    with_network = replace(trainer.published, policy={"ltd": text_of(network(3))})
    assert plan.request(with_network).in_force == text_of(network(3))
