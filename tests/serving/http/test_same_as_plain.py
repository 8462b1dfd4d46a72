"""Over HTTP, the same body gets the same answer with and without drafts."""

from __future__ import annotations

import random

import pytest

from oracles.random_bodies import TEXTS, is_same, question, said
from tests.serving.http.live import running_server

TOLERANCE = 1e-3
"""Allowed difference of a log probability: float32 passes differ in shape."""


@pytest.fixture(scope="module")
def drafting_server(tiny_target_dir, tmp_path_factory):
    """Drafts whether it pays or not: the policy's own choice depends on the machine's speed."""
    fixed = "policy.kind=fixed", "policy.draft_k=3"
    with running_server(tiny_target_dir, tmp_path_factory.mktemp("drafting"), *fixed) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_random_bodies_are_answered_as_without_drafts(drafting_server, path):
    numbers = random.Random(path)
    proposed, choices = 0, set()
    with drafting_server.client() as client:
        for number in range(25):
            body = question(numbers, "chat" in path, numbers.choice(TEXTS), vocab_size=288)
            plain = client.post(path, json={**body, "speculation": {"max_draft": 0}})
            drafted = client.post(path, json=body)
            assert (plain.status_code, drafted.status_code) == (200, 200), plain.text
            wanted, got = said(plain.json()), said(drafted.json())
            assert is_same(wanted, got, TOLERANCE), f"body {number}: {body}"
            assert len(got["choices"]) == body["n"]
            assert plain.json()["speculation"]["proposed"] == 0
            proposed += drafted.json()["speculation"]["proposed"]
            choices.add(body["n"])
    assert proposed > 100
    assert choices == {1, 2, 3}
