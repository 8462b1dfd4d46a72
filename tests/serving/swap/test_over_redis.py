"""A service whose buffer is in Redis records, swaps, and does not care whether Redis is there."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from buffer.backends import open_backend
from buffer.traces import TraceReader
from configs.schema import Settings
from oracles.engines import Collected, request_of
from oracles.redis_servers import RedisServer, valkey_binary
from serving.build import build_service

PROMPT = [40, 41, 42, 43]


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    server = RedisServer(valkey_binary())
    yield server
    server.close()


@pytest.fixture
def url(server, tmp_path):
    return f"{server.url}?run={tmp_path.name}&timeout_s=0.5"


def built(tiny_target_dir, tmp_path, url, poll_s):
    settings = Settings.model_validate(
        {
            "target": str(tiny_target_dir),
            "run_dir": tmp_path,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 200, "page_size": 4},
            "drafter": {"max_draft": 4},
            "policy": {"kind": "fixed", "draft_k": 3},
            "buffer": {"url": url, "sync_interval_s": 0.02},
            "swap": {"poll_s": poll_s, "watch_rounds": 96},
        }
    )
    return build_service(settings)


@pytest.fixture
def service(tiny_target_dir, tmp_path, url):
    service = built(tiny_target_dir, tmp_path, url, 1000)  # only what is announced is seen
    service.start()
    yield service
    service.stop()


def ask(service, name):
    collected, done = Collected(), threading.Event()

    def take(output):
        collected.take(output)
        if output.finish_reason:
            done.set()

    service.inbox.submit(request_of(name, PROMPT, 30), take)
    assert done.wait(60)
    return collected.token_ids


def test_a_version_that_is_announced_is_swapped_in_without_polling(service, tmp_path, url):
    first = ask(service, "before")
    store = open_backend(url, tmp_path).open_weights()
    assert store.versions() == [0]
    wait_until(lambda: service.swapper.swap(None)["version"] == 0)  # its thread runs
    bundle = store.read(0)

    def has_swapped():
        newest = max(store.versions())
        if newest < 20:
            manifest = replace(bundle.manifest, version=newest + 1, parent=newest)
            store.publish(manifest, bundle.files)  # again if it did not listen yet
        time.sleep(0.5)
        return service.swapper.status()["version"] > 0

    wait_until(has_swapped)
    assert ask(service, "after") == first
    reader = TraceReader(open_backend(url, tmp_path))
    wait_until(lambda: reader.read(10) or reader.counts.read >= 2)


def test_serving_goes_on_while_redis_is_gone_and_all_traces_are_counted(
    service, tmp_path, url, server
):
    first = ask(service, "there")
    wait_until(lambda: service.recorder.counts()["written"] == 1)
    server.kill()
    try:
        answers = [ask(service, f"gone-{i}") for i in range(6)]
        assert answers == [first] * 6
        counts = service.recorder.counts()
        assert (counts["queued"], counts["written"], counts["failed"]) == (7, 1, 0)
        assert service.swapper.status()["versions"] == []
    finally:
        server.start()
    wait_until(lambda: service.recorder.counts()["written"] == 7)
    reader = TraceReader(open_backend(url, tmp_path))
    assert len(reader.read(20)) == 7
    assert reader.counts.duplicate == 0


def test_an_outage_is_logged_once_and_its_end(tiny_target_dir, tmp_path, url, server, caplog):
    caplog.set_level("INFO", "serving")
    service = built(tiny_target_dir, tmp_path, url, 0.01)
    polls = []
    look, store = service.swapper._shelf.store.versions, service.swapper._shelf.store
    store.versions = lambda: (polls.append(1), look())[1]
    service.start()

    def told(text):
        return [one.message for one in caplog.records if text in one.message]

    try:
        wait_until(lambda: polls)
        server.kill()
        try:
            wait_until(lambda: told("cannot look for new versions"))
            before = len(polls)
            wait_until(lambda: len(polls) >= before + 5)
        finally:
            server.start()
        wait_until(lambda: told("can look for new versions again, after"))
    finally:
        service.stop()

    assert len(told("cannot look for new versions")) == 1
    assert len(told("can look for new versions again")) == 1
