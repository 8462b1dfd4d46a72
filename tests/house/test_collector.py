"""``tests/conftest.py`` hides what was imported from the garbage collector, also after a service,
which would show everything to it again."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module")
def many():
    """How many objects are hidden when this module begins."""
    return gc.get_freeze_count()


def test_what_was_imported_is_hidden_from_the_collector_and_the_collector_runs(many):
    assert gc.isenabled()
    assert many > 100_000
    assert len(gc.get_objects()) < many


def test_what_a_test_thaws(many, real_collector):
    gc.unfreeze()

    assert gc.get_freeze_count() == 0


def test_is_hidden_again_from_the_next_one(many):
    assert gc.get_freeze_count() > many / 2


def test_services_neither_hide_nor_show_anything(many):
    before = gc.get_freeze_count()
    gc.freeze()
    gc.unfreeze()

    assert gc.get_freeze_count() == before
