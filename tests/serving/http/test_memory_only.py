"""With ``capture.memory_only`` a server and a trainer learn, and no file of theirs ever holds a
prompt, a token id or a hidden row."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buffer.backends import CATALOG, open_backend
from buffer.codec import decode_trace
from buffer.interface import TraceLimits
from buffer.records import Trace
from configs.checks import IN_MEMORY, check_settings
from configs.schema import Settings
from oracles.canaries import files_of, forms_of_ids, forms_of_rows, forms_of_text, hits
from oracles.forked import Forked
from tests.serving.http.live import environment, running_server, wait_for
from trainer.cli import app

NUM_PROMPTS = 24
TRAINER = (
    "trainer.device=cpu",
    "trainer.cpu_threads=1",
    "trainer.min_traces=8",
    "trainer.batch_tokens=128",
    "trainer.max_sequence=64",
    "trainer.ttt_steps=2",
    "trainer.publish_every_steps=4",
    "trainer.gate_margin=0.01",
    "trainer.checkpoint_every_s=0.5",
    "trainer.replay_ratio=50",
)


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[list[Forked]]:
    """Trainers that a test has started; none outlives it."""
    started: list[Forked] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start_trainer(folder: Path, settings: tuple[str, ...], number: int) -> Forked:
    sets = [part for setting in settings for part in ("--set", setting)]
    log = folder / f"trainer-{number}.txt"
    return Forked(["-m", "trainer", "launch", *sets], environment(), folder, log)


def traces_in(run_dir: Path) -> list[Trace]:
    reader = open_backend("socket:", run_dir).open_record_reader()
    traces = []
    while records := reader.read(64):
        traces += [decode_trace(record.payload) for record in records]
    reader.close()
    return traces


def forms_of(traces: list[Trace]) -> list[bytes]:
    """What must be in no file: eight token ids in a row, of prompts and of answers, and pieces of
    hidden rows."""
    forms: list[bytes] = []
    for trace in traces:
        ids = trace.token_ids.tolist()
        forms += forms_of_ids(ids[:8]) + forms_of_ids(ids[-8:])
        assert trace.features is not None
        rows = trace.features.rows.reshape(len(trace.features.rows), -1)
        forms += forms_of_rows(rows[0][:12]) + forms_of_rows(rows[-1][-12:])
    return forms


def test_no_file_ever_holds_a_prompt_a_token_id_or_a_row(
    tiny_target_dir: Path, tmp_path: Path, trainers: list[Forked]
) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    run_dir = folder / "run"
    private = ("buffer.url=socket:", "capture.memory_only=true", "log_level=debug")
    about = (f"target={tiny_target_dir}", f"run_dir={run_dir}", *private, *TRAINER)
    chance = random.Random(7)
    prompts = ["".join(chance.choices("abcdefgh ", k=24)) for _ in range(NUM_PROMPTS)]
    texts = [form for prompt in prompts for form in forms_of_text(prompt)]

    with running_server(tiny_target_dir, folder, *private, "swap.poll_s=0.1") as server:
        trainers.append(start_trainer(folder, about, 0))
        wait_for(lambda: (run_dir / "traces.sock").exists(), 120)
        with server.client() as client:
            for prompt in prompts:
                body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "user": "acme"}
                assert client.post("/v1/completions", json=body).status_code == 200
        wait_for(lambda: server.metric("traces_total", result="written") == NUM_PROMPTS, 60)
        traces = traces_in(run_dir)
        assert len(traces) == NUM_PROMPTS
        status = run_dir / "trainer" / "status.json"
        wait_for(lambda: status.exists() and json.loads(status.read_text())["step"] >= 8, 120)
        checkpoints = run_dir / "trainer" / "checkpoints"
        wait_for(lambda: any(int(p.name) > 1 for p in checkpoints.glob("[0-9]" * 8)), 120)

        wanted = [*texts, *forms_of(traces)]
        pids = [server.process.pid, trainers[0].pid]
        trainers[0].send_signal(signal.SIGSTOP)  # it replaces checkpoints all the time
        try:
            assert hits(files_of(folder, pids), wanted) == []
        finally:
            trainers[0].send_signal(signal.SIGCONT)
        assert (run_dir / "weights" / "0").is_dir()

        deleted = open_backend("socket:", run_dir).delete("acme")
        assert deleted.records == NUM_PROMPTS
        wait_for(lambda: json.loads(status.read_text())["traces"]["held"] == 0, 60)
        assert traces_in(run_dir) == []

        trainers[0].kill()  # leaves no traces behind, and another one resumes without them
        trainers[0].wait()
        trainers.append(start_trainer(folder, about, 1))
        events = run_dir / "trainer" / "log.jsonl"
        wait_for(lambda: '"event": "resumed"' in events.read_text(), 120)
        with server.client() as client:
            body = {"prompt": prompts[0], "max_tokens": 4, "user": "acme"}
            assert client.post("/v1/completions", json=body).status_code == 200
        wait_for(lambda: len(traces_in(run_dir)) == 1, 60)
        trainers[1].send_signal(signal.SIGTERM)
        assert trainers[1].wait(timeout=120) == 0
        assert server.stop() == 0
    assert hits(files_of(folder), wanted) == []

    # The same traces in a log on the disk are found: the search itself works.
    log = tmp_path / "log"
    limits = TraceLimits(1 << 20, 1 << 26, 1e6, 0.0)
    from buffer.codec import encode_trace

    with open_backend("log:", log).open_trace_writer(limits) as writer:
        for trace in traces:
            writer.append(encode_trace(trace))
    found = {form for _, form in hits(files_of(log), wanted)}
    assert all(forms_of_ids(t.token_ids.tolist()[:8])[0] in found for t in traces)


def test_settings_that_would_write_traces_are_refused() -> None:
    for url in ("log:", "file:/x", "redis://127.0.0.1:1/0", "kafka://127.0.0.1:1/x"):
        settings = Settings.model_validate(
            {"buffer": {"url": url}, "capture": {"memory_only": True}}
        )
        (problem,) = check_settings(settings)
        assert f"buffer.url begins with '{url.partition(':')[0]}:'" in problem
        assert "set buffer.url to 'socket:'" in problem
    for scheme in IN_MEMORY:
        settings = Settings.model_validate(
            {"buffer": {"url": f"{scheme}:/x"}, "capture": {"memory_only": True}}
        )
        assert check_settings(settings) == []
        assert scheme in CATALOG


def test_contradictions_of_capture_are_refused() -> None:
    settings = Settings.model_validate(
        {"capture": {"tenants": ["a", "b"], "excluded_tenants": ["b"], "redact": "nothing"}}
    )
    problems = check_settings(settings)
    assert problems == [
        "capture.redact 'nothing' must look like 'module:function'",
        "capture.tenants and capture.excluded_tenants both name 'b'; take one out",
    ]


def test_a_vocabulary_of_the_traffic_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "ids.json"
    sets = ("buffer.url=socket:", "capture.memory_only=true", f"run_dir={tmp_path}")
    options = [part for one in sets for part in ("--set", one)]
    result = CliRunner().invoke(app, ["vocabulary", "--size", "8", "--out", str(out), *options])
    assert result.exit_code == 2
    assert "says which tokens the traffic used" in result.output
    assert not out.exists()
