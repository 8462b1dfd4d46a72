"""The record of hardware and software that goes with every published figure."""

from __future__ import annotations

import json
import platform
import re

from examples.machine import machine


def test_machine_names_hardware_versions_and_commit():
    found = machine()

    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["cpu"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"]
    assert found["commit"] is None or re.match(r"[0-9a-f]{40}( with changes)?$", found["commit"])
    assert json.loads(json.dumps(found)) == found
