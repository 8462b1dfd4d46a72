"""Nothing that a request says appears in a log, a metric, an error of others or a report."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from oracles.canaries import files_of
from tests.serving.http.live import running_server, wait_for

CANARY = re.compile(rb"canary[0-9a-f]{12}")
PROMPTS_AT_ONCE = 50


def canary() -> str:
    return f"canary{secrets.token_hex(6)}"


def test_of_1000_canaries_none_is_in_logs_metrics_errors_or_reports(
    tiny_target_dir: Path, tmp_path: Path
) -> None:
    prompts = [canary() for _ in range(1000)]
    more = (
        "log_level=debug",
        "drafter.kind=suffix",
        "server.log_stats_s=0.2",
        "server.processes=1",
        "engine.max_queue=64",
    )
    shown: list[str] = []
    with running_server(tiny_target_dir, tmp_path, *more) as server, server.client() as client:
        for at in range(0, 900, PROMPTS_AT_ONCE):
            body = {
                "prompt": prompts[at : at + PROMPTS_AT_ONCE],
                "max_tokens": 1,
                "user": canary(),
                "stop": [canary()],
                "cache_salt": canary(),
            }
            assert posted(client, "/v1/completions", body) == 200
        for prompt in prompts[900:950]:
            message = {"role": "user", "content": prompt}
            body = {"messages": [message], "max_tokens": 1, "temperature": 0}
            assert posted(client, "/v1/chat/completions", body) == 200
        for number, prompt in enumerate(prompts[950:]):
            wrong = [
                {"prompt": prompt, "max_tokens": 10**9},
                {"prompt": prompt * 400},
                {"prompt": prompt, "temperature": "warm"},
                {"prompt": [prompt, 7]},
                {"prompt": prompt, "logit_bias": {"-1": 3}},
            ][number % 5]
            answer = client.post("/v1/completions", json=wrong)
            assert answer.status_code == 400, answer.text
            shown.append(answer.text)
        broken = f'{{"prompt": "{prompts[0]}", '
        as_json = {"Content-Type": "application/json"}
        answer = client.post("/v1/completions", content=broken, headers=as_json)
        assert answer.status_code == 400
        shown.append(answer.text)
        wait_for(lambda: server.metric("traces_total", result="written") >= 900, 60)
        for path in ("/metrics", "/health", "/ready", "/version", "/dashboard", "/admin/drafter"):
            shown.append(client.get(path).text)
        running = {path.name: path.read_bytes() for path in others_than_traces(tmp_path)}
        assert {"server.json", "audit.jsonl", "log.txt"} <= running.keys()
        assert [name for name, content in running.items() if CANARY.search(content)] == []
        assert server.stop() == 0

    assert [text for text in shown if CANARY.search(text.encode())] == []
    left = others_than_traces(tmp_path)
    assert [path for path in left if CANARY.search(path.read_bytes())] == []
    (line,) = (tmp_path / "run" / "audit.jsonl").read_text().splitlines()
    assert json.loads(line)["action"] == "write"
    # Tenants are in traces, by name: this is what the search would have found.
    traces = set(files_of(tmp_path)) - set(left)
    assert any(CANARY.search(path.read_bytes()) for path in traces)


def others_than_traces(folder: Path) -> list[Path]:
    """All files but the segments of the trace log."""
    return [path for path in files_of(folder) if path.suffix != ".seg"]


def posted(client, path, body) -> int:
    return client.post(path, json=body).status_code
