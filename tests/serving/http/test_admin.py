"""Operators' commands, on a server that keeps answering requests."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

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


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, None, 409),
        ({}, b"", 409),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"", 409),  # curl -d ''
        ({"Content-Type": "text/plain", "Content-Encoding": "gzip"}, b"", 409),
        ({"Content-Type": "application/json"}, b"", 409),
        ({}, b"{}", 415),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Transfer-Encoding": "chunked"}, b"", 415),
    ],
)
def test_an_order_without_a_body_needs_no_content_type(
    locked_server: LiveServer, headers, content, status
):
    """409: this server's drafter does not learn, so there is nothing to roll back."""
    with locked_server.client() as client:
        answer = client.post("/admin/drafter/rollback", headers=headers, content=content)
        assert answer.status_code == status, answer.text
        refused = client.post("/v1/completions", headers=headers, content=content)
        assert refused.status_code == (415 if status == 415 else 400)


def test_a_web_page_still_cannot_order_anything(server: LiveServer):
    """A browser sends a POST without a body to any address unasked, but says where it is from."""
    for what in ("drafter/rollback", "drafter/swap", "drain"):
        answer = httpx.post(f"{server.url}/admin/{what}", headers={"Origin": "https://a.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "web_page")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/health", "/ready", "/version", "/admin/drafter"]
)
def test_a_slash_at_the_end_of_a_path_changes_nothing(server: LiveServer, path: str):
    with server.client() as client:
        with_slash, without = client.get(path + "/"), client.get(path)
        assert with_slash.status_code == without.status_code == 200
        assert with_slash.json().keys() == without.json().keys()
        assert client.get("//").status_code == 404


def test_a_slash_at_the_end_opens_no_door(locked_server: LiveServer):
    for path in ("/v1/models/", "/v1/models/org/tiny/", "/admin/drafter/", "/metrics/"):
        assert httpx.get(f"{locked_server.url}{path}").status_code == 401


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
