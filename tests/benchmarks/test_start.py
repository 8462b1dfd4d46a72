"""What a server's log says of its start is what the benchmark reads."""

from __future__ import annotations

import logging
from io import StringIO

import pytest

from benchmarks.start import _phases
from configs.logs import FORMAT, OneRecord
from configs.phases import seconds_of_life, timed, took


def test_parts_of_a_start_are_found_in_the_log(monkeypatch):
    text, logger = StringIO(), logging.getLogger("configs.phases")
    handler = logging.StreamHandler(text)
    handler.setFormatter(OneRecord(FORMAT))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})

    with timed("loaded the target", "loading the target"):
        pass
    took("programs, capturing", 2.5)
    logger.info("12 programs are ready after 3.0 s, 4 are left for later")

    found = _phases(text.getvalue())
    assert found.keys() == {"loaded the target", "programs, capturing"}
    assert found["programs, capturing"] == 2.5


def test_a_process_knows_its_age():
    age_s = seconds_of_life()
    if age_s is None:
        pytest.skip("this system does not tell")
    assert 0 < age_s < 24 * 3600
