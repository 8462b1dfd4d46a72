"""What tests of drafters run under."""

from __future__ import annotations

import pytest

from drafters.suffix import compiled
from tests.trainer.traffic import save_target

# Compiling the search of the suffix index counts for no test's time.
compiled.wait()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its folder and its model."""
    folder = tmp_path_factory.mktemp("target")
    return folder, save_target(folder)
