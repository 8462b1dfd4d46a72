"""Published versions enter a running service: whole, between two steps, and never a wrong one."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from configs.schema import Settings
from oracles.engines import Collected, request_of
from policies.features import NUM_FEATURES
from policies.fixed import FixedPolicy
from policies.network import Network
from serving.build import build_service

PROMPT = [40, 41, 42, 43]


@pytest.fixture
def service(tiny_target_dir, tmp_path):
    settings = settings_for(tiny_target_dir, tmp_path)
    service = build_service(settings)
    service.start()
    yield service
    service.stop()


def settings_for(target, run_dir, **swap):
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 200, "page_size": 4},
            "drafter": {"max_draft": 4},
            "policy": {"kind": "fixed", "draft_k": 3},
            "swap": {"poll_s": 0.02, "watch_rounds": 96, **swap},
        }
    )


def ask(service, name, max_tokens=30, prompt=PROMPT, **params):
    collected, done = Collected(), threading.Event()

    def take(output):
        collected.take(output)
        if output.finish_reason:
            done.set()

    service.inbox.submit(request_of(name, prompt, max_tokens, **params), take)
    assert done.wait(60)
    return collected


def publish_next(root, change=lambda tensors: tensors, **fields):
    """Version n + 1, its tensors those of version 0 after ``change``."""
    first = FolderWeights(root).read(0)
    tensors = change(load(first.files[TENSORS]))
    version = max(FolderWeights(root).versions()) + 1
    manifest = replace(first.manifest, version=version, parent=version - 1, **fields)
    FolderWeights(root).publish(manifest, {TENSORS: save(tensors)})
    return version


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def noisy(tensors):
    torch.manual_seed(1)
    return {k: v + 0.5 * torch.randn_like(v) for k, v in tensors.items()}


def test_a_new_version_is_taken_by_itself_and_no_output_changes(service, tmp_path):
    before = ask(service, "before")
    assert publish_next(tmp_path / "weights", noisy) == 1
    wait_until(lambda: service.drafter_status()["version"] == 1)

    after = ask(service, "after")

    assert after.token_ids == before.token_ids
    assert (before.last.stats.drafter_version, after.last.stats.drafter_version) == (0, 1)
    assert service.figures().swaps == {"swapped": 1, "rejected": 0, "rolled_back": 0}


def test_a_malformed_calibration_is_ignored_counted_and_named_and_its_weights_serve(
    service, tmp_path, caplog
):
    publish_next(tmp_path / "weights", noisy, policy={"acceptance": [0.6, 2.0], "parent": [0]})
    wait_until(lambda: service.figures().swaps["swapped"] == 1)

    assert (service.drafter_status()["version"], service.figures().ignored_calibrations) == (1, 1)
    assert ask(service, "after").last.stats.drafter_version == 1
    [said] = [line for line in caplog.messages if "calibration" in line]
    assert "version 1" in said and "acceptance must be a list" in said and "parent must" in said


def test_a_network_that_came_with_a_version_and_is_refused_is_named_and_counted(
    tiny_target_dir, tmp_path, caplog
):
    """The policy decodes plainly then, and nobody would know why."""
    settings = settings_for(tiny_target_dir, tmp_path)
    policy = settings.policy.model_copy(update={"kind": "ltd"})
    service = build_service(settings.model_copy(update={"policy": policy}))
    service.start()
    publish_next(tmp_path / "weights", noisy, policy={"ltd": "no base64"})
    wait_until(lambda: service.figures().swaps["swapped"] == 1)

    assert service.figures().ignored_calibrations == 1
    [said] = [line for line in caplog.messages if "calibration" in line]
    assert "version 1 of eagle3" in said and "must be base64" in said
    assert ask(service, "after").last.stats.drafter_version == 1
    service.stop()


def always(k, max_draft=4):
    """A network of the policy ``ltd`` that plays this K."""
    blank = np.zeros(NUM_FEATURES, np.float32)
    hidden = np.zeros((2, NUM_FEATURES), np.float32), np.zeros(2, np.float32)
    out = np.zeros((max_draft + 1, 2), np.float32), np.eye(max_draft + 1, dtype=np.float32)[k]
    return Network(blank, blank + 1, *hidden, *out).to_text()


def test_a_version_that_brings_a_policy_alone_changes_the_policy_and_is_not_watched(
    tiny_target_dir, tmp_path
):
    """It has the weights of the version in force. Judged by tokens_per_step, a policy that rightly
    drafts less would be rolled back."""
    settings = settings_for(tiny_target_dir, tmp_path)
    update = {"kind": "ltd", "guard": False, "random_share": 0.0}
    policy = settings.policy.model_copy(update=update)
    service = build_service(settings.model_copy(update={"policy": policy}))
    service.start()
    try:
        publish_next(tmp_path / "weights", policy={"ltd": always(4)})
        wait_until(lambda: service.figures().swaps["swapped"] == 1)
        before = ask(service, "before", max_tokens=150)
        assert before.last.stats.proposed >= 3 * before.last.stats.steps
        assert service.drafter_status()["state"] == "steady"

        publish_next(tmp_path / "weights", policy={"ltd": always(1)})
        wait_until(lambda: service.figures().swaps["swapped"] == 2)
        for number in range(3):
            after = ask(service, f"after {number}", max_tokens=150)

        assert after.token_ids == before.token_ids
        assert after.last.stats.proposed <= after.last.stats.steps
        status = service.drafter_status()
        assert (status["version"], status["state"]) == (2, "steady")
        assert [one["event"] for one in status["history"]] == ["swapped", "swapped"]
    finally:
        service.stop()


def test_such_a_version_waits_while_the_weights_are_watched(service, tmp_path):
    """Taken at once, it would take the place of the weights that those in force may go back to."""
    publish_next(tmp_path / "weights", noisy)
    wait_until(lambda: service.drafter_status()["version"] == 1)
    swapper = service.swapper
    swapper._watch._state = "watching"
    store = FolderWeights(tmp_path / "weights")
    bundle = store.read(1)
    store.publish(replace(bundle.manifest, version=2, parent=1, files={}), bundle.files)
    time.sleep(0.3)
    assert service.drafter_status()["version"] == 1

    swapper._watch._state = "steady"
    wait_until(lambda: service.drafter_status()["version"] == 2)


def test_in_a_trial_both_weights_decode_with_the_policy_of_the_newer_version(
    tiny_target_dir, tmp_path
):
    """A trial compares tokens_per_step: with a policy of their own that drafts more, former weights
    would look better than they are."""
    settings = settings_for(tiny_target_dir, tmp_path)
    update = {"kind": "ltd", "guard": False, "random_share": 0.0}
    policy = settings.policy.model_copy(update=update)
    service = build_service(settings.model_copy(update={"policy": policy}))
    service.start()
    force = service.swapper._force
    try:
        publish_next(tmp_path / "weights", policy={"ltd": always(4), "acceptance": [0.7]})
        wait_until(lambda: service.figures().swaps["swapped"] == 1)
        publish_next(tmp_path / "weights", noisy, policy={"ltd": always(1), "acceptance": [0.6]})
        wait_until(lambda: service.figures().swaps["swapped"] == 2)

        def speculated(name):
            stats = ask(service, name, max_tokens=60).last.stats
            return stats.drafter_version, round(stats.proposed / stats.steps)

        assert speculated("new") == (2, 1)
        force.exchange("trial of the former version")
        assert speculated("trial") == (1, 1)
        force.exchange("trial over")
        assert speculated("over") == (2, 1)
        force.roll_back("worse")
        version, drafted = speculated("rolled back")
        assert version == 1 and drafted >= 3
    finally:
        service.stop()


def test_a_network_means_nothing_to_another_policy(service, tmp_path):
    publish_next(tmp_path / "weights", noisy, policy={"ltd": always(1), "specdecpp": "no head"})
    wait_until(lambda: service.figures().swaps["swapped"] == 1)
    assert service.figures().ignored_calibrations == 0
    assert ask(service, "after").last.stats.proposed > 0


def test_a_policy_that_fails_in_a_swap_does_not_stop_it(tiny_target_dir, tmp_path, caplog):
    """It is from anybody, and the weights are in force: requests go on with them."""

    class Failing(FixedPolicy):
        def on_swap(self, drafter, version, calibration):
            if version:
                raise RuntimeError("cannot take it in")

        def figures(self):
            raise RuntimeError("nothing to show")

    settings = settings_for(tiny_target_dir, tmp_path)
    service = build_service(settings, wrap=lambda _: Failing("eagle3", 3, needs_match=False))
    service.start()
    before = ask(service, "before")
    publish_next(tmp_path / "weights", noisy)
    wait_until(lambda: service.figures().swaps["swapped"] == 1)

    after = ask(service, "after")

    assert (after.token_ids, after.last.stats.drafter_version) == (before.token_ids, 1)
    assert service.figures().policy_failures == 1
    assert "version 1 of eagle3" in next(x for x in caplog.messages if "policy failed" in x)
    shown = service.policy_figures()
    assert (shown["kind"], shown["failures"]) == ("Failing", 1)
    assert "nothing to show" in shown["error"]
    service.stop()


def test_copies_of_weights_follow_a_swap_and_the_way_back(service, tmp_path):
    """On a CPU the drafter multiplies with packed copies of its weights."""
    drafter = service.engine.drafting.neural["eagle3"].drafter
    rows = torch.randn(3, drafter.output_size, generator=torch.Generator().manual_seed(0))
    publish_next(tmp_path / "weights", noisy)

    found = []
    for version in (1, 0):
        service.swapper.swap(version)
        ask(service, f"at {version}")
        assert drafter.version == version
        with torch.no_grad():
            found.append(drafter._fused.logits(rows))
            torch.testing.assert_close(found[-1], drafter.module.logits(rows), atol=1e-4, rtol=1e-4)

    assert not torch.allclose(*found, atol=1e-2)


def test_requests_under_way_survive_many_swaps(service, tmp_path):
    root = tmp_path / "weights"
    publish_next(root, noisy)
    want = ask(service, "want", 100, max_draft=0).token_ids
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            service.swapper.swap(0)
            service.swapper.swap(1)

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        answers = [ask(service, str(i), 100) for i in range(3)]
    finally:
        stop.set()
        flipper.join()

    assert all(a.token_ids == want for a in answers)
    assert service.figures().swaps["swapped"] >= 10


def damage_digest(root, version):
    file = root / str(version) / TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_short(root, version):
    file = root / str(version) / TENSORS
    file.write_bytes(file.read_bytes()[:-7])


def drop_manifest(root, version):
    (root / str(version) / "manifest.json").unlink()


@pytest.mark.parametrize("harm", [damage_digest, cut_short, drop_manifest])
def test_a_damaged_bundle_is_refused_and_the_old_one_serves_on(service, tmp_path, harm):
    root = tmp_path / "weights"
    # Made aside, so that the watcher cannot see it before it is damaged.
    aside = tmp_path / "aside"
    shutil.copytree(root, aside)
    version = publish_next(aside, noisy)
    harm(aside, version)
    want = ask(service, "before").token_ids

    shutil.move(aside / str(version), root / str(version))
    wait_until(lambda: service.figures().swaps["rejected"] == 1)

    status = service.drafter_status()
    assert status["version"] == 0
    assert "snapshot 1 is damaged" in status["last_error"]
    assert ask(service, "after").token_ids == want
    with pytest.raises(ValueError, match="snapshot 1 is damaged"):
        service.swapper.swap(1)

    publish_next(root, noisy)
    wait_until(lambda: service.drafter_status()["version"] == 2)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_fingerprint": "0" * 64}, "made for target 000000000000"),
        ({"kind": "medusa"}, "is a medusa drafter"),
    ],
)
def test_a_foreign_bundle_is_refused_by_what_is_foreign(service, tmp_path, fields, text):
    publish_next(tmp_path / "weights", **fields)
    wait_until(lambda: service.figures().swaps["rejected"] == 1)
    assert text in service.drafter_status()["last_error"]
    assert service.drafter_status()["version"] == 0


def test_a_bundle_of_another_shape_is_refused(service, tmp_path):
    root = tmp_path / "weights"
    config = {**FolderWeights(root).read(0).manifest.drafter_config, "intermediate_size": 7}
    publish_next(root, drafter_config=config)
    wait_until(lambda: service.figures().swaps["rejected"] == 1)
    assert "another shape (intermediate_size differ)" in service.drafter_status()["last_error"]


def test_an_older_version_is_taken_only_by_order_and_pins(service, tmp_path):
    root = tmp_path / "weights"
    publish_next(root, noisy)
    wait_until(lambda: service.drafter_status()["version"] == 1)

    assert service.swapper.swap(0)["state"] == "pinned"
    publish_next(root, noisy)
    time.sleep(0.3)
    assert service.drafter_status()["version"] == 0

    assert service.swapper.swap(None)["version"] == 2


def test_a_rolled_back_version_stays_away_also_after_a_restart(service, tiny_target_dir, tmp_path):
    publish_next(tmp_path / "weights", noisy)
    wait_until(lambda: service.drafter_status()["version"] == 1)

    assert service.swapper.rollback()["version"] == 0
    time.sleep(0.2)
    assert service.drafter_status()["version"] == 0
    service.stop()

    again = build_service(settings_for(tiny_target_dir, tmp_path))
    again.start()
    time.sleep(0.3)
    assert again.drafter_status()["version"] == 0
    again.stop()


def test_a_full_disk_delays_the_record_of_a_rollback_and_loses_nothing(
    service, tmp_path, monkeypatch
):
    publish_next(tmp_path / "weights", noisy)
    wait_until(lambda: service.drafter_status()["version"] == 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("buffer.folder_weights.write_atomically", full)
        assert service.swapper.rollback()["version"] == 0
        time.sleep(0.2)
    denied = tmp_path / "weights" / "DENIED.json"
    wait_until(denied.exists)
    assert denied.read_text() == "[1]"


def test_rollbacks_by_several_servers_of_a_run_are_all_kept(service, tmp_path):
    publish_next(tmp_path / "weights", noisy)
    wait_until(lambda: service.drafter_status()["version"] == 1)
    (tmp_path / "weights" / "DENIED.json").write_text("[7]")

    service.swapper.rollback()
    service.stop()

    assert (tmp_path / "weights" / "DENIED.json").read_text() == "[1, 7]"


def test_a_restart_passes_over_a_damaged_newest_version(tiny_target_dir, tmp_path):
    first = build_service(settings_for(tiny_target_dir, tmp_path))
    first.stop()
    root = tmp_path / "weights"
    publish_next(root, noisy)
    damage_digest(root, publish_next(root, noisy))

    assert build_service(settings_for(tiny_target_dir, tmp_path)).drafter_status()["version"] == 1


def steps_with(service, changes, num_steps):
    """Decode one request on this thread; returns its text and its rows of the drafter.

    Args:
        changes: what is done before a step, by its number.
    """
    collected = Collected()
    service.inbox.submit(request_of("one", PROMPT, 150, ignore_eos=True), collected.take)
    for number in range(num_steps):
        changes.get(number, lambda: None)()
        service.engine.step()
    (sequence,) = service.engine.scheduler.running
    drafter = service.engine.drafting.neural["eagle3"].drafter
    slots = torch.tensor([4 * page + i for page in sequence.pages for i in range(4)])
    whole = slots[: len(sequence.tokens) - 1]
    return sequence.tokens, [pool[whole].clone() for pool in (drafter.keys, drafter.values)]


def test_a_trial_holds_newer_versions_back_as_long_as_it_drafts(service, tmp_path):
    swapper, kind = service.swapper, service.swapper._force.kind
    swapper._watch._state = "trial"
    for _ in range(400):
        swapper.between_steps()
        swapper.on_rounds(kind, [])
    version = publish_next(tmp_path / "weights", noisy)
    time.sleep(4 * swapper._poll_s)
    assert service.drafter_status()["version"] < version

    for _ in range(400):  # the policy has fallen silent
        swapper.between_steps()
    wait_until(lambda: service.drafter_status()["version"] == version)


@pytest.mark.parametrize("event", ["trial", "rollback"])
def test_former_weights_do_not_draft_from_the_rows_of_the_ones_that_are_tried(
    tiny_target_dir, tmp_path, event
):
    """In a trial they looked as bad as the version that they were compared with."""
    found = []
    for name in ("alone", "tried"):
        service = build_service(settings_for(tiny_target_dir, tmp_path / name, enabled=False))
        publish_next(tmp_path / name / "weights", noisy)
        force, shelf = service.swapper._force, service.swapper._shelf
        changes = {
            10: lambda force=force, shelf=shelf: force.take(shelf.load(1, force)),
            25: lambda force=force: (
                force.exchange("trial") if event == "trial" else force.roll_back("worse")
            ),
        }
        found.append(steps_with(service, {} if name == "alone" else changes, 40))
        assert service.drafter_status()["version"] == 0
        service.stop()

    (alone_ids, alone), (tried_ids, tried) = found
    num = min(len(alone_ids), len(tried_ids)) - 1
    assert num > 40 and tried_ids[:num] == alone_ids[:num]
    for ours, theirs in zip(tried, alone, strict=True):
        torch.testing.assert_close(ours[:num], theirs[:num], rtol=1e-4, atol=1e-4)
