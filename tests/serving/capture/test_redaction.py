"""``capture.redact`` sees every trace before it leaves the server, and can stop nothing else."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from buffer.backends import open_backend
from buffer.traces import TraceReader
from configs.schema import Settings
from oracles.engines import Collected, request_of
from serving.build import build_service
from serving.capture.redaction import load_redact

PROMPT = [40, 41, 42, 43]
CANARY = "sk-canary-1f9a"


@pytest.fixture
def hooks(monkeypatch):
    """A module of hooks, and an event that the slow one waits for."""
    module = ModuleType("redaction_hooks")
    go_on = threading.Event()

    def blank(trace):
        ids = np.where(trace.token_ids == 41, 0, trace.token_ids).astype(np.int32)
        return replace(trace, token_ids=ids, tenant="redacted", features=None, seq=99, epoch=1)

    def keep_back(trace):
        return None if trace.tenant == "acme" else trace

    def fail(trace):
        if trace.tenant == "acme":
            raise RuntimeError(f"{CANARY} {trace.token_ids}")
        return trace

    def leave(trace):
        if trace.tenant == "acme":
            sys.exit(CANARY)
        return trace

    def nonsense(trace):
        return "no trace"

    def wait(trace):
        assert go_on.wait(60)
        return trace

    for one in (blank, keep_back, fail, leave, nonsense, wait):
        setattr(module, one.__name__, one)
    module.number = 7
    monkeypatch.setitem(sys.modules, "redaction_hooks", module)
    return go_on


@pytest.fixture
def serve(hooks, tiny_target_dir, tmp_path):
    """Start a service with these settings of ``capture``."""
    started = []

    def start(**capture):
        settings = Settings.model_validate(
            {
                "target": str(tiny_target_dir),
                "run_dir": tmp_path,
                "device": "cpu",
                "engine": {"max_batch": 2, "max_model_len": 100, "page_size": 4},
                "policy": {"kind": "fixed", "draft_k": 2},
                "buffer": {"sync_interval_s": 0.02},
                "capture": capture,
            }
        )
        service = build_service(settings)
        service.start()
        started.append(service)
        return service

    yield start
    hooks.set()
    for service in started:
        service.stop()


def ask(service, name, tenant="default"):
    collected, done = Collected(), threading.Event()

    def take(output):
        collected.take(output)
        if output.finish_reason:
            done.set()

    service.inbox.submit(replace(request_of(name, PROMPT, 4), tenant=tenant), take)
    assert done.wait(60)
    return collected.token_ids


def counts_of(service, num_queued):
    """The recorder's counts once all of these traces are dealt with."""
    deadline = time.monotonic() + 60
    while True:
        counts = service.recorder.counts()
        if counts["queued"] == num_queued == sum(counts.values()) - num_queued:
            return counts
        assert time.monotonic() < deadline, counts
        time.sleep(0.01)


def test_what_the_function_returns_is_what_leaves(serve, tmp_path):
    service = serve(redact="redaction_hooks:blank")
    ask(service, "one", "acme")
    assert counts_of(service, 1)["written"] == 1
    (trace,) = TraceReader(open_backend("log:", tmp_path)).read(10)
    assert trace.token_ids.tolist()[:4] == [40, 0, 42, 43]
    assert (trace.tenant, trace.features, trace.seq) == ("redacted", None, 0)
    assert trace.epoch > 1


@pytest.mark.parametrize(
    ("hook", "raised"), [("keep_back", None), ("fail", "RuntimeError"), ("leave", "SystemExit")]
)
def test_what_it_keeps_back_or_fails_on_is_counted_and_nothing_is_said_of_it(
    serve, tmp_path, hook, raised, caplog
):
    service = serve(redact=f"redaction_hooks:{hook}")
    answers = [ask(service, str(i), ("acme", "umbrella")[i % 2]) for i in range(6)]
    assert len(set(map(tuple, answers))) == 1
    counts = counts_of(service, 6)
    assert (counts["written"], counts["withheld"]) == (3, 3)
    traces = TraceReader(open_backend("log:", tmp_path)).read(10)
    assert {trace.tenant for trace in traces} == {"umbrella"}
    assert CANARY not in caplog.text
    assert caplog.text.count("capture.redact raised") == (raised is not None)
    assert raised is None or f"capture.redact raised {raised}" in caplog.text


def test_something_else_than_a_trace_does_not_leave(serve):
    service = serve(redact="redaction_hooks:nonsense")
    ask(service, "one")
    assert counts_of(service, 1)["withheld"] == 1


def test_a_function_that_hangs_stops_no_answer(serve, hooks):
    service = serve(redact="redaction_hooks:wait", queue_traces=2)
    answers = [ask(service, str(i)) for i in range(8)]
    assert len(set(map(tuple, answers))) == 1
    hooks.set()
    counts = counts_of(service, 8)
    assert counts["written"] + counts["dropped"] == 8
    assert counts["written"] >= 2


def test_tenants_that_opted_out_leave_no_trace(serve, tmp_path):
    service = serve(excluded_tenants=["acme"])
    assert ask(service, "one", "acme") == ask(service, "two", "umbrella")
    assert counts_of(service, 1)["written"] == 1
    (trace,) = TraceReader(open_backend("log:", tmp_path)).read(10)
    assert trace.tenant == "umbrella"


def test_only_tenants_that_opted_in_leave_traces(serve, tmp_path):
    service = serve(tenants=["acme"])
    ask(service, "one", "acme"), ask(service, "two", "umbrella"), ask(service, "three")
    assert counts_of(service, 1)["written"] == 1
    (trace,) = TraceReader(open_backend("log:", tmp_path)).read(10)
    assert trace.tenant == "acme"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("redaction_hooks", "must look like 'module:function'"),
        (":f", "must look like"),
        ("no_such_module:f", "importing 'no_such_module' raised ModuleNotFoundError"),
        ("redaction_hooks:missing", "'redaction_hooks' has no 'missing'"),
        ("redaction_hooks:number", "it is no function"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_the_start(hooks, spec, problem):
    with pytest.raises(ValueError, match=problem):
        load_redact(spec)


def test_a_deleted_tenant_is_dropped_before_it_leaves(serve, tmp_path, monkeypatch):
    service = serve()
    ask(service, "one", "acme")
    counts_of(service, 1)
    open_backend("log:", tmp_path).delete("acme")
    assert TraceReader(open_backend("log:", tmp_path)).read(10) == []
    ask(service, "two", "acme")  # after the deletion: kept
    assert counts_of(service, 2)["written"] == 2
    assert len(TraceReader(open_backend("log:", tmp_path)).read(10)) == 1
