"""Operators' commands, on a server that keeps answering requests."""

from __future__ import annotations

from dataclasses import replace

import httpx

from buffer.folder_weights import FolderWeights
from tests.serving.http.live import LiveServer, wait_for

ASK = {"prompt": "def add(", "max_tokens": 8, "temperature": 0, "seed": 1}


def publish_copy(server: LiveServer, version: int) -> None:
    """Publish version 0 again under another number."""
    store = FolderWeights(server.run_dir / "weights")
    bundle = store.read(0)
    manifest = replace(bundle.manifest, version=version, parent=0, files={})
    store.publish(manifest, bundle.files)


def order(client: httpx.Client, what: str, body: dict | None = None) -> httpx.Response:
    return client.post(f"/admin/drafter/{what}", json={} if body is None else body)


def test_a_version_is_swapped_in_and_rolled_back_between_requests(server: LiveServer):
    with server.client() as client:
        before = client.post("/v1/completions", json=ASK).json()
        unknown = order(client, "swap", {"version": 7})
        early = order(client, "rollback")
        publish_copy(server, 1)
        swapped = order(client, "swap", {"version": 1})
        during = client.post("/v1/completions", json=ASK).json()
        card = client.get("/v1/models").json()["data"][0]
        metric = server.metric("drafter_version")
        is_ready = client.get("/ready").status_code == 200
        rolled_back = order(client, "rollback")
        after = client.post("/v1/completions", json=ASK).json()

    assert unknown.status_code == early.status_code == 409
    assert unknown.json()["error"]["code"] == "swap_refused"
    assert "version 7 is not published" in unknown.json()["error"]["message"]
    assert (swapped.status_code, swapped.json()["version"]) == (200, 1)
    assert card["metadata"]["drafter_version"] == metric == 1
    assert is_ready
    assert (rolled_back.status_code, rolled_back.json()["version"]) == (200, 0)
    assert server.metric("weight_swaps_total", result="rolled_back") == 1
    versions = [x["speculation"]["drafter_version"] for x in (before, during, after)]
    assert versions == [0, 1, 0]
    assert before["choices"] == during["choices"] == after["choices"]


def test_the_status_says_where_it_stands(server: LiveServer):
    with server.client() as client:
        status = client.get("/admin/drafter").json()
    assert (status["kind"], status["version"]) == ("eagle3", 0)
    assert {"parent", "staleness", "state", "versions", "former", "last_error"} <= status.keys()


def test_a_server_whose_drafter_does_not_learn_refuses_to_swap(locked_server: LiveServer):
    with locked_server.client() as client:
        answers = [order(client, "swap", {"version": 1}), order(client, "rollback")]
    for answer in answers:
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "swap_refused"
        assert "nothing to swap" in answer.json()["error"]["message"]


def test_orders_take_exactly_their_fields(server: LiveServer):
    with server.client() as client:
        for what, body in [
            ("swap", {"version": "1"}),
            ("swap", {"version": -1}),
            ("swap", {"versoin": 1}),
            ("rollback", {"version": 1}),
        ]:
            assert order(client, what, body).status_code == 400


def test_a_request_may_keep_out_of_the_traces(server: LiveServer):
    def queued() -> float:
        return server.metric("traces_total", result="queued")

    with server.client() as client:
        before = queued()
        client.post("/v1/completions", json={**ASK, "capture": False})
        client.post("/v1/completions", json=ASK, headers={"X-Slipstream-No-Capture": "1"})
        kept_out = queued()
        client.post("/v1/completions", json={**ASK, "capture": True})
        wait_for(lambda: queued() > before, 5)

    assert kept_out == before
    assert queued() == before + 1
