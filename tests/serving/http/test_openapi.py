"""The API matches /openapi.json: generated requests, valid and invalid, to every route."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serving.http.routes import ALL
from tests.serving.http.live import LiveServer, environment

DRAIN = "/admin/drain"
"""Drains the server that other tests use; tested in `test_drain.py`."""
OWN = "/openapi.json"
"""Read by schemathesis and excluded from its tests."""
SILENT = "positive_data_acceptance,ignored_auth"
"""The first has a stricter form in `openapi_hooks.py`; the second needs a key, see
`test_auth.py`."""
OPTIONS = {
    "--phases": "examples,coverage,fuzzing",
    "--mode": "all",
    "--max-examples": "10",
    "--checks": "all",
    "--exclude-checks": SILENT,
    "--exclude-path": DRAIN,
    "--request-timeout": "20",
}


@pytest.mark.timeout(400)
def test_every_answer_is_what_the_schema_says(server: LiveServer, tmp_path: Path):
    options = [part for option in OPTIONS.items() for part in option]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *(*options, "--generation-deterministic", "--no-color"),
        ],
        env=environment(SCHEMATHESIS_HOOKS="oracles.openapi_hooks"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Tested: {len(ALL) - len([DRAIN, OWN])}" in run.stdout
    assert "failed in the engine" not in server.log


def test_every_route_is_in_the_schema(server: LiveServer):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {(r.path_format, m.lower()) for r in ALL for m in r.methods} == {
        (path, method) for path, methods in paths.items() for method in methods
    }
    for methods in paths.values():
        for operation in methods.values():
            assert "422" not in operation["responses"]  # a wrong parameter is a 400 here


def test_the_limits_are_this_servers_own(server: LiveServer):
    models = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    request = models["CompletionRequest"]["properties"]
    assert request["n"]["anyOf"][0]["maximum"] == 8
    assert request["max_tokens"]["anyOf"][0]["maximum"] == 512
    assert request["model"]["anyOf"][0]["enum"] == ["tiny"]
    (token_id,) = request["logit_bias"]["anyOf"][0]["patternProperties"]
    fitting = [text for text in map(str, range(3000)) if re.search(token_id, text)]
    assert fitting == [str(number) for number in range(288)]


def test_a_key_is_wanted_where_one_is_set(server: LiveServer, locked_server: LiveServer):
    with server.client() as client:
        free = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    with locked_server.client() as client:
        locked = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    assert "security" not in free
    assert locked["security"] == [{"HTTPBearer": []}]
