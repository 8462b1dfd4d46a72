"""Servers that tests share; each test leaves them as it found them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving.http.live import LiveServer, running_server

KEY = "sk-test-5b1f"


@pytest.fixture(scope="session")
def server(tiny_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Open on loopback, with HTTP in two processes beside the engine's."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(tiny_target_dir, folder, "server.processes=2") as server:
        yield server


@pytest.fixture(scope="session")
def locked_server(
    tiny_target_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """With a key, a batch of one, a queue of one, and requests that may choose their drafters. HTTP
    is in the engine's process."""
    folder = tmp_path_factory.mktemp("locked")
    queue = (
        "engine.max_batch=1",
        "engine.max_queue=1",
        "drafter.kind=suffix",
        "drafter.on_request=[suffix_request]",
        "server.model_name=org/tiny",
        "server.processes=0",
    )
    with running_server(tiny_target_dir, folder, *queue, SLIPSTREAM_SERVER__API_KEY=KEY) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client
