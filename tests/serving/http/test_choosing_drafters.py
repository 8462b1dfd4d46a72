"""`speculation.drafters` chooses drafters where the settings let requests choose."""

from __future__ import annotations

import pytest

from tests.serving.http.live import LiveServer

ASK = {"prompt": "ab ab ab ab ab", "max_tokens": 24, "temperature": 0.7, "seed": 3}


def complete(server: LiveServer, drafters, **speculation):
    body = {**ASK, "capture": False, "speculation": {"drafters": drafters, **speculation}}
    with server.client() as client:
        return client.post("/v1/completions", json=body)


def test_a_server_that_lets_requests_choose_says_among_what(locked_server: LiveServer):
    with locked_server.client() as client:
        drafters = client.get("/admin/drafter").json()["drafters"]

    known = {d["kind"]: (d["on_request"], d["needs_match"], d["shares_text"]) for d in drafters}
    assert known == {"suffix": (False, True, True), "suffix_request": (True, True, False)}


@pytest.mark.parametrize("drafters", [None, [], ["suffix"], ["suffix_request"]])
def test_the_answer_does_not_depend_on_the_choice(locked_server: LiveServer, drafters):
    plain = complete(locked_server, [], max_draft=0).json()
    answer = complete(locked_server, drafters)

    assert answer.status_code == 200
    assert answer.json()["choices"] == plain["choices"]
    if not drafters and drafters is not None:
        assert answer.json()["speculation"]["proposed"] == 0


def test_a_drafter_that_the_server_does_not_have_is_refused_by_name(locked_server: LiveServer):
    answer = complete(locked_server, ["suffix", "medusa"])

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "speculation.drafters")
    assert "no drafter 'medusa'; known: suffix, suffix_request" in error["message"]


def test_requests_may_not_choose_unless_the_settings_say_so(server: LiveServer):
    answer = complete(server, ["suffix"])

    assert answer.status_code == 400
    assert "speculation.drafters: only if the setting drafter.on_request" in answer.text
    with server.client() as client:
        schema = client.get("/openapi.json").json()["components"]["schemas"]
    options = schema["SpeculationOptions"]["properties"]["drafters"]
    assert options["anyOf"] == [{"type": "null"}]
