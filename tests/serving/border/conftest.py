"""A running service, without HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.schema import Settings
from serving.build import build_service
from serving.service import Service
from tests.serving.http.live import MODEL


def settings_of(target: Path, run_dir: Path) -> Settings:
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 4, "max_queue": 8, "max_model_len": 256},
            "drafter": {"kind": "suffix"},
            "policy": {"kind": "fixed", "drafter": "suffix", "draft_k": 3},
            "server": {"port": 0, "processes": 1, "model_name": MODEL},
        }
    )


@pytest.fixture
def new_service(tiny_target_dir: Path, tmp_path: Path) -> Iterator[Callable[[], Service]]:
    """Makes one that a test may break."""
    made: list[Service] = []

    def make() -> Service:
        service = build_service(settings_of(tiny_target_dir, tmp_path))
        service.start()
        made.append(service)
        return service

    yield make
    for service in made:
        service.stop()


@pytest.fixture(scope="module")
def service(tiny_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all tests of a module, which leave it idle."""
    service = build_service(settings_of(tiny_target_dir, tmp_path_factory.mktemp("border")))
    service.start()
    yield service
    service.stop()
