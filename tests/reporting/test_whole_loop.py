"""A server and a trainer of one run report all that the dashboard shows, and learn and answer as
they would without."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buffer.fingerprint import target_fingerprint
from configs.schema import Settings
from oracles.engines import Collected, request_of
from oracles.wandb_files import offline_runs
from policies.interface import Decision, StepObs
from reporting.dashboard import GOLDEN, figures_of
from reporting.names import TIME, is_known
from reporting.reports import Reports, reports_of
from serving.build import build_service
from serving.reporting import reported
from serving.service import Service
from tests.policies.logs import any_k, log, traces_of
from tests.trainer.traffic import write_traces
from trainer.build import build_trainer
from trainer.loop import run

DOMAINS = ("code", "tales")


def settings_for(target: Path, run_dir: Path, **sections: Any) -> Settings:
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 100, "page_size": 4},
            "drafter": {"max_draft": 4, "suffix": {"enabled": False}},
            "swap": {"poll_s": 0.02},
            "trainer": {
                "device": "cpu",
                "nice": 0,
                "lr": 3e-3,
                "batch_tokens": 256,
                "min_traces": 8,
                "publish_every_steps": 5,
                "replay_ratio": 99.0,
                "warmup_steps": 2,
                "held_out_every": 3,
                "gate_confidence": 0.5,
                "gate_margin": 0.5,
                "max_steps": 15,
            },
            **sections,
        }
    )


def ask_all(service: Service, requests: list[Any]) -> dict[str, list[int]]:
    """Token ids of the answers, two requests at a time."""
    found: dict[str, Collected] = {one.id: Collected() for one in requests}
    room, done = threading.Semaphore(2), threading.Semaphore(0)

    def take(output: Any) -> None:
        found[output.request_id].take(output)
        if output.finish_reason:
            room.release()
            done.release()

    for one in requests:
        room.acquire()
        service.inbox.submit(one, take)
    for _ in requests:
        assert done.acquire(timeout=60)
    return {name: one.token_ids for name, one in found.items()}


def requests_of(count: int) -> list[Any]:
    """Without drafts at first, then with one and with three tokens, so that each is timed."""
    return [
        request_of(
            str(n),
            [40 + n % 7, 41, 42],
            24,
            max_draft=(0, 1, 3)[3 * n // count],
            domain=("code", "tales", "a secret name")[n % 3],
        )
        for n in range(count)
    ]


class Drafts:
    """The goodput policy, but it drafts as much as it may."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def rest(self) -> None:
        return None

    def plan(self, obs: StepObs) -> Decision:
        k = min(obs.max_draft, max(obs.caps))
        return Decision("eagle3" if k else "none", k, 1.0, explore=False, reason="all")


def train(settings: Settings, reports: Reports | None = None) -> Any:
    """Train until all steps are done and, if a policy is fitted, it was judged."""
    trainer = build_trainer(settings, threading.Event(), reports)
    thread = threading.Thread(target=lambda: run(trainer))
    thread.start()
    fits = trainer.publisher.fits
    if fits.is_on:
        wait_until(lambda: trainer.published.version > 0 and fits.last is not None, 110)
        trainer.stop.set()
    thread.join()
    return trainer


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_an_offline_run_of_the_loop_holds_all_that_the_dashboard_names(
    tiny_target_dir: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        tiny_target_dir,
        tmp_path,
        wandb={"mode": "offline", "artifacts": True},
        reports={"every_s": 0.1, "domains": DOMAINS, "close_s": 60.0},
    )
    more = {"max_steps": None, "policy": {"kind": "ltd", "least_steps": 1000}}
    own = settings.trainer.model_validate({**settings.trainer.model_dump(), **more})
    settings = settings.model_copy(update={"trainer": own})
    service = build_service(settings, wrap=Drafts)
    service.start()
    fingerprint = target_fingerprint(tiny_target_dir)
    steps = traces_of(log(1280, any_k, (1,)))
    write_traces(tmp_path, (replace(one, target_fingerprint=fingerprint) for one in steps))
    try:
        with reported(service, settings), reports_of(settings, "trainer") as reports:
            ask_all(service, requests_of(36))
            wait_until(lambda: service.figures().traces.get("written", 0) == 36)
            trainer = train(settings, reports)
            assert trainer.published.version > 0
            wait_until(lambda: service.drafter_status()["version"] == trainer.published.version)
            ask_all(service, requests_of(6))
        status = service.drafter_status()
    finally:
        service.stop()

    runs = offline_runs(tmp_path)
    names = {name for one in runs.values() for name in one.names() if not name.startswith("_")}
    wanted, patterns, tables = figures_of(GOLDEN.read_text())
    assert (wanted | tables) - names == set()
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in names)] == []
    assert {n for n in names - {TIME} - tables if not is_known(n)} == set()
    domains = {n.split("/")[1] for n in names if n.startswith("domain/")}
    assert domains <= {*DOMAINS, "other"} and "other" in domains

    assert {one.group for one in runs.values()} == {tmp_path.name}
    assert all(TIME in row for one in runs.values() for row in one.rows if len(row) > 1)
    gates = runs["trainer"].table("events/gate")
    assert {row["kind"] for row in runs["trainer"].table("events/policy")} == {"ltd"}
    assert any(row["passed"] for row in gates) and {row["why"] for row in gates} >= {"passed"}
    assert [row["version"] for row in runs["server"].table("events/swaps")][-1] == status["version"]
    assert any(name.endswith("-drafter") for name in runs["trainer"].artifacts)
    assert status["payback"]["learning_seconds"] > 0
    everything = b"".join(p.read_bytes() for p in (tmp_path / "wandb").rglob("*") if p.is_file())
    assert b"a secret name" not in everything


@pytest.fixture
def silent_service() -> Iterator[str]:
    """A service that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_service_that_hangs_changes_no_answer_and_no_version(
    tiny_target_dir: Path,
    tmp_path: Path,
    silent_service: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_service)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    hung = {
        "wandb": {"mode": "online"},
        "reports": {"every_s": 0.05, "queue": 3, "close_s": 0.2},
    }
    settings = settings_for(tiny_target_dir, tmp_path, **hung)
    service = build_service(settings)
    service.start()
    try:
        without = ask_all(service, requests_of(12))
        with reported(service, settings) as of_server:
            assert ask_all(service, requests_of(12)) == without
            wait_until(lambda: of_server.num_lost > 0)
    finally:
        service.stop()
    with reports_of(settings, "trainer") as of_trainer:
        trainer = train(settings, of_trainer)

    assert trainer.learner.step == 15
    counts = of_trainer.counts()["wandb"]
    assert counts["written"] == 0 and counts["dropped"] > 3
