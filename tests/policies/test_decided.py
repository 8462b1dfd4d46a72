"""Policies decide as they did: a change of ours that alters a decision must say so.

After one that is meant to, ``python -m tests.policies.decided`` stores the new digests.
"""

from __future__ import annotations

import json

import pytest

from tests.policies.decided import STORED, cases, decided, made_with

_STORED = json.loads(STORED.read_text())
DIGESTS = _STORED["digests"]


def test_every_policy_of_the_catalog_is_among_them():
    assert sorted(DIGESTS) == sorted(f"{kind}, {name}" for kind, name in cases())


@pytest.mark.skipif(made_with() != _STORED["made_with"], reason="digests of another processor")
@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_decisions_are_those_of_before(kind, name):
    assert decided(kind, name) == DIGESTS[f"{kind}, {name}"]
