"""The benchmark of bad bundles, each kind once: none is loaded, and it would notice."""

from __future__ import annotations

import json
import random

from benchmarks.bad_bundles import (
    EXPECTED,
    Trial,
    make_keys,
    measure,
    rows_of,
    signature_kinds,
    sound,
)
from benchmarks.bundles.kinds import FILES, FOLDERS, MANIFESTS
from benchmarks.bundles.stores import InFolder
from serving.swap.flat_weights import load_bundle


def test_no_bad_bundle_is_loaded_from_a_folder(tmp_path):
    num_kinds = len(MANIFESTS) + len(FILES) + len(FOLDERS) + len(signature_kinds(None))
    figures = measure(tmp_path, bundles=num_kinds, redis=0, kafka=0, seed=1)

    found = figures["stores"]["folder"]
    assert found["kinds"] == found["bad"] == num_kinds > 150
    assert (found["loaded"], found["errors"]) == ([], [])
    assert sum(found["refused"].values()) == num_kinds
    assert {"damaged", "kind", "target", "shape", "tensors", "unsigned", "signature"} == set(
        found["refused"]
    )
    assert found["sound_loaded"] >= 8
    assert figures["republished"] == {"folder": {"refused": 50}}
    assert all(row.holds for row in rows_of(figures))
    json.dumps(figures)


def test_a_bundle_that_loads_is_reported(tmp_path):
    trial = Trial(InFolder(tmp_path / "run"), random.Random(0), make_keys(tmp_path))
    trial.bad("not bad at all", lambda given, _: given.having(created_unix_ms=7))
    assert trial.findings.loaded == ["not bad at all"]


def test_bundles_are_sound_but_for_what_makes_them_bad(tmp_path):
    target = InFolder(tmp_path / "run")
    trial = Trial(target, random.Random(0), make_keys(tmp_path))
    target.plant(1, sound(1, random.Random(0)))
    assert load_bundle(target.store, 1, trial.weights, EXPECTED).manifest.version == 1
