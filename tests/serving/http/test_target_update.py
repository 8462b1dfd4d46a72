"""A trainer of the target sends its weights to a server whose HTTP is in processes of its own."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from oracles.support import save_tiny_target
from tests.serving.http.live import LiveServer

ASK = {"prompt": "def add(", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
URL = "/admin/target/update"


def test_answers_follow_the_weights_that_were_sent(
    server: LiveServer, tiny_target_dir: Path, tmp_path: Path
):
    other = save_tiny_target(tmp_path, seed=1)
    with server.client() as client:

        def answer() -> list[dict]:
            return client.post("/v1/completions", json=ASK).json()["choices"]

        def send(folder: Path) -> httpx.Response:
            return client.post(URL, json={"path": str(folder)})

        version = client.get("/admin/target").json()["version"]
        before = answer()
        sent = send(other)
        during = answer()
        refused = send(tmp_path / "nowhere")
        metric = server.metric("target_version")
        back = send(tiny_target_dir)
        after = answer()

    assert (sent.status_code, sent.json()["version"]) == (200, version + 1)
    assert before == after != during
    assert refused.status_code == 409
    assert "nowhere is not a folder" in refused.json()["error"]["message"]
    assert metric == version + 1
    assert (back.status_code, back.json()["version"]) == (200, version + 2)
    assert "steps waited" in server.log


@pytest.mark.parametrize(("method", "path"), [("GET", "/admin/target"), ("POST", URL)])
def test_only_the_operator_may_see_or_change_the_target(
    locked_server: LiveServer, server: LiveServer, method: str, path: str
):
    unknown = httpx.request(method, f"{locked_server.url}{path}", json={"path": "x"})
    assert unknown.status_code == 401
    page = httpx.request(method, f"{server.url}{path}", headers={"Origin": "https://a.example"})
    assert (page.status_code, page.json()["error"]["code"]) == (403, "web_page")


@pytest.mark.parametrize("path", ["/tmp/x\n2026-11-29 INFO fake", "/tmp/\x1b[31m", "/tmp/\x00"])
def test_a_path_that_no_terminal_shows_is_refused(server: LiveServer, path: str):
    with server.client() as client:
        answer = client.post(URL, json={"path": path})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "path")
    assert "fake" not in server.log
