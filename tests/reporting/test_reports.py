"""Reports reach their writers, and a writer that hangs, fails or is missing changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.choices import SettingsError
from configs.schema import Settings
from oracles.support import REPOSITORY
from oracles.wandb_files import offline_runs
from reporting.catalog import check_writers
from reporting.channel import Channel
from reporting.names import TIME
from reporting.records import Greeting, shown
from reporting.reports import Reports, reports_of


def settings_for(run_dir: Path, **sections: Any) -> Settings:
    return Settings.model_validate({"run_dir": run_dir, **sections})


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def silent_service() -> Iterator[str]:
    """A service that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_offline_run_holds_what_was_reported_and_when(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path, wandb={"mode": "offline", "artifacts": True}, reports={"group": "night"}
    )
    bundle = tmp_path / "weights" / "3"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")

    with reports_of(settings, "server") as reports:
        reports.figures({"server/version": 3, "server/draft_k": None}, unix_s=1000.5)
        reports.figures({"trainer/alpha_2": 0.5, "trainer/loss": float("nan")}, unix_s=1001.0)
        reports.row("events/swaps", {"event": "swapped", "version": 3}, unix_s=1002.0)
        reports.row("events/swaps", {"event": "rolled back", "version": 2}, unix_s=1003.0)
        reports.alert("A version was rolled back", "acceptance fell")
        reports.bundle(3, bundle, {"parent": 2})
        reports.bundle(4, tmp_path / "weights" / "4", {"parent": 3})  # pruned meanwhile
        wait_until(lambda: sum(reports.counts()["wandb"].values()) == 7)
        counts = reports.counts()["wandb"]

    run = offline_runs(tmp_path)["server"]
    assert counts == {"written": 6, "dropped": 0, "failed": 1}
    assert run.group == "night"
    points = [{k: v for k, v in row.items() if not k.startswith("_")} for row in run.rows]
    assert {TIME: 1000.5, "server/version": 3.0} in points
    assert {TIME: 1001.0, "trainer/alpha_2": 0.5} in points
    assert run.steps["server/version"] == run.steps["trainer/alpha_*"] == TIME
    table = run.table("events/swaps")
    assert [(row[TIME], row["event"], row["version"]) for row in table] == [
        (1002.0, "swapped", 3),
        (1003.0, "rolled back", 2),
    ]
    assert run.alerts == ["A version was rolled back"]
    assert run.artifacts.count("night-drafter") == 1


def test_nothing_secret_is_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = [f"CANARY{n}" for n in range(8)]
    monkeypatch.setenv("SLIPSTREAM_TEST_SECRET", canaries[0])
    monkeypatch.setattr(sys, "argv", ["serving", f"--set=server.api_key={canaries[1]}"])
    settings = settings_for(
        tmp_path,
        wandb={"mode": "offline"},
        server={"api_key": canaries[1]},
        buffer={"url": f"redis://user:{canaries[2]}@host:1/0"},
        capture={"tenants": [canaries[3]], "redact": canaries[4]},
        trainer={"signing_key": canaries[5], "group": canaries[6]},
        drafter={"path": canaries[7]},
    )

    with reports_of(settings, "trainer") as reports:
        reports.figures({"trainer/loss": 1.0})
        wait_until(lambda: reports.counts()["wandb"]["written"] == 1)

    run = offline_runs(tmp_path)["trainer"]
    assert run.config["trainer"]["draw"] == "turns"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    everything = b"".join(path.read_bytes() for path in files)
    assert b"trainer/loss" in everything
    node = os.uname().nodename
    if len(node) >= 6:  # a shorter name stands in random ids and digests now and then
        canaries.append(node)
    assert [canary for canary in canaries if canary.encode() in everything] == []


def test_only_domains_of_the_settings_are_named() -> None:
    reports = Reports((), ("code", "a/b"))

    assert [reports.domain(name) for name in ("code", "my secret", "", "a/b")] == [
        "code",
        "other",
        "other",
        "a_b",
    ]


def test_settings_that_are_shown_are_listed_one_by_one() -> None:
    everything = Settings(server={"api_key": "key"}).model_dump(mode="json")  # type: ignore[arg-type]

    found = shown(everything)

    assert set(found) == {
        "device", "dtype", "seed", "engine", "drafter", "policy", "swap", "trainer",
    }  # fmt: skip
    assert "signing_key" not in found["trainer"]  # type: ignore[operator]


def test_a_service_that_hangs_is_given_up_and_everything_is_counted(
    tmp_path: Path, silent_service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_service)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    settings = settings_for(
        tmp_path, wandb={"mode": "online"}, reports={"queue": 10, "close_s": 1.0}
    )

    with reports_of(settings, "server") as reports:
        [channel] = reports._channels
        wait_until(lambda: channel._process is not None)
        for number in range(1000):
            reports.figures({"server/version": number})
        process = channel._process
        assert process is not None and process.poll() is None
        counts = reports.counts()["wandb"]
        assert (counts["written"], counts["dropped"]) == (0, 990)

    assert process.poll() is not None, "its process is gone"
    assert reports.counts()["wandb"] == {"written": 0, "dropped": 1000, "failed": 0}


def greeting(folder: Path, writer: str = "tensorboard") -> Greeting:
    return Greeting(writer, "server", "g", str(folder), {"enabled": True}, {})


def test_a_writer_that_dies_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dies = [sys.executable, "-c", "import sys; sys.stdin.readline(); print('written', flush=True)"]
    channel = Channel(greeting(tmp_path), 100, dies)
    reports = Reports((channel,))

    for _ in range(5):
        reports.figures({"server/version": 1})
    wait_until(lambda: channel.counts()["dropped"] == 5)
    reports.figures({"server/version": 1})
    wait_until(lambda: "the writer 'tensorboard' ended" in caplog.text)

    assert channel.counts() == {"written": 0, "dropped": 6, "failed": 0}
    assert reports.num_lost == 6
    reports.close(5.0)


def test_a_writer_that_cannot_begin_says_why(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    settings = settings_for(tmp_path, tensorboard={"enabled": True})

    with reports_of(settings, "server") as reports:
        reports.figures({"server/version": 1})
        wait_until(lambda: reports.num_lost == 1)

    said = capfd.readouterr().err
    assert "tensorboard cannot begin" in said and "nothing else changes" in said


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = settings_for(tmp_path, tensorboard={"enabled": True})

    with reports_of(settings, "trainer") as reports:
        reports.figures({"trainer/loss": 1.5}, unix_s=1000.0)
        reports.figures({"trainer/loss": 0.5}, unix_s=1002.0)
        reports.row("events/gate", {"passed": True}, unix_s=1003.0)
        reports.bundle(1, tmp_path, {})

    events = EventAccumulator(str(tmp_path / "tensorboard" / "trainer"))
    events.Reload()
    points = [(e.wall_time, e.step, e.value) for e in events.Scalars("trainer/loss")]
    assert points == [(1000.0, 1000, 1.5), (1002.0, 1002, 0.5)]
    [text] = events.Tensors("events/gate")
    assert json.loads(text.tensor_proto.string_val[0]) == {"passed": True}
    assert reports.counts() == {"tensorboard": {"written": 4, "dropped": 0, "failed": 0}}


@pytest.mark.parametrize(
    ("sections", "asked", "extra"),
    [
        ({"wandb": {"mode": "offline"}}, "wandb.mode 'offline'", "wandb"),
        ({"tensorboard": {"enabled": True}}, "tensorboard.enabled", "tensorboard"),
    ],
)
def test_a_missing_extra_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    asked: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed

    check_writers(settings_for(tmp_path))  # nothing is asked for
    with pytest.raises(SettingsError) as caught:
        check_writers(settings_for(tmp_path, **sections))

    assert str(caught.value) == (
        f"{asked} needs the package {extra}, which is not installed: "
        f"pip install 'slipstream-serving[{extra}]'"
    )


def test_everything_imports_without_the_extras() -> None:
    code = (
        "import sys\n"
        "for name in ('wandb', 'wandb_workspaces', 'tensorboard'): sys.modules[name] = None\n"
        "import reporting.dashboard, reporting.catalog as c, reporting.reports, reporting.channel\n"
        "assert [c.writer_kind(name).extra for name in c.CATALOG] == ['wandb', 'tensorboard']\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
