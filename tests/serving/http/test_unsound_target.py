"""What clients and load balancers see of a target that computes NaN."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles.support import save_tiny_target
from tests.serving.http.live import MODEL, running_server

BAD = 9
BODY = {"model": MODEL, "max_tokens": 4, "temperature": 0, "logit_bias": {str(BAD): -100}}
"""Or a sound request may draw the bad token."""
POISONED = [3, BAD, 4]
SOUND = [3, 5, 4]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its embedding of token ``BAD`` is NaN."""
    folder = save_tiny_target(tmp_path_factory.mktemp("poisoned"))
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "embed_tokens" in name)
    weights["lm_head.weight"] = weights.get("lm_head.weight", weights[name].clone())
    weights[name][BAD] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with running_server(folder, tmp_path_factory.mktemp("run")) as server:
        yield server


def ask(client, prompt, **more):
    return client.post("/v1/completions", json={**BODY, "prompt": prompt, **more})


def corrupted(client):
    lines = client.get("/metrics").text.splitlines()
    line = next(x for x in lines if x.startswith("slipstream:corrupted_requests_total"))
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("more", [{}, {"temperature": 1, "seed": 5}, {"temperature": 1, "n": 2}])
def test_the_error_says_what_went_wrong_and_that_repeating_it_is_useless(server, more):
    with server.client() as client:
        answer = ask(client, POISONED, **more)
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "not_finite")
        assert error["message"].startswith("The target computed NaN or infinity for this request")
        assert ask(client, SOUND, **more).status_code == 200


def test_openais_client_raises_it_in_a_stream(server):
    with server.openai() as client:
        stream = client.completions.create(**BODY, prompt=POISONED, stream=True)
        with pytest.raises(openai.APIError, match="NaN or infinity") as caught:
            list(stream)
        assert caught.value.code == "not_finite"
        client.completions.create(**BODY, prompt=SOUND)


def test_ready_says_so_when_it_repeats_and_recovers_by_one_sound_answer(server):
    with server.client() as client:
        assert ask(client, SOUND).status_code == 200
        before = corrupted(client)
        for _ in range(3):
            assert client.get("/ready").json() == {"status": "ready", "reason": None}
            assert ask(client, POISONED).status_code == 500
        answer = client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["status"] == "not ready"
        assert "NaN or infinity in the last 3 requests" in answer.json()["reason"]
        assert client.get("/health").status_code == 200
        assert corrupted(client) == before + 3
        assert ask(client, SOUND).status_code == 200
        assert client.get("/ready").status_code == 200


def test_a_target_that_can_answer_nothing_does_not_start(tmp_path):
    folder = save_tiny_target(tmp_path / "target")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("model.norm.weight"))
    weights[name][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    told = "the target computes NaN or infinity for every prompt that was tried"
    with pytest.raises(AssertionError, match=told), running_server(folder, tmp_path):
        pass
