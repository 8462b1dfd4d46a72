"""A network that somebody else has put in place while a trainer fits its own."""

from __future__ import annotations

import json
from dataclasses import asdict

from policies.weight_file import text_of
from tests.policies.logs import profile
from tests.trainer.test_fits import enough, fitting, network, run_until
from tests.trainer.test_loop import build, events
from tests.trainer.traffic import write_traces
from trainer.fits import FittingProcess
from trainer.fitted_policy import policy_path


def with_profile(folder):
    samples = [asdict(one) for one in profile()]
    (folder / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))
    return folder


def test_a_network_that_came_during_a_fit_stays(tmp_path, world):
    """The fit did not know of it, and would have replaced one that nothing was compared with."""
    run_dir = with_profile(tmp_path)
    write_traces(run_dir, enough(world))
    trainer = build(fitting(run_dir, world))
    path = policy_path(run_dir)

    def write():
        if trainer.publisher.fits.process is not None and not path.exists():
            path.parent.mkdir()
            path.write_bytes(network(3))
        return events(run_dir, "policy_gate") != []

    run_until(trainer, write)

    gate = events(run_dir, "policy_gate")[0]
    assert gate["passed"] and not gate["kept"] and "has come meanwhile" in gate["text"]
    assert path.read_bytes() == network(3)


def test_a_fit_is_judged_against_the_network_that_waits_for_the_next_version(
    tmp_path, world, monkeypatch
):
    """It would take the place of that one, and not of the published one."""
    run_dir = with_profile(tmp_path)
    trainer = build(fitting(run_dir, world))
    fits, asked = trainer.publisher.fits, []
    fits.keep(network(3))
    begin = FittingProcess.__init__

    def noted(process, request, *others):
        asked.append(request)
        begin(process, request, *others)

    monkeypatch.setattr(FittingProcess, "__init__", noted)
    fits.begin(trainer.published)
    fits.close()
    policy_path(run_dir).unlink()
    fits.begin(trainer.published)
    fits.close()

    assert [one.in_force for one in asked] == [text_of(network(3)), None]
