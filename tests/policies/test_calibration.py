"""What is malformed in a bundle's calibration is ignored as a whole, and said by name."""

from __future__ import annotations

import pytest

from policies.acceptance import AcceptanceModel
from policies.calibration import Calibration
from policies.groups import published_shifts
from policies.versions import VersionMemory
from tests.policies.simulated import DRAFTERS

SOUND = {
    "acceptance": [0.8, 1],
    "parent": 3,
    "parent_acceptance": [0.7, 0.0],
    "acceptance_by_temperature": {"0": [0.9], "2": [0.5, 0.4]},
    "ltd": "a network, which is not read here",
}
NO_LIST = "must be a list of numbers from 0 to 1"


def test_a_sound_calibration_is_read_without_complaint():
    assert Calibration.of(SOUND) == (
        [0.8, 1.0], 3, [0.7, 0.0], {"0": [0.9], "2": [0.5, 0.4]}, ()
    )  # fmt: skip
    assert Calibration.of({}) == ([], None, [], {}, ())


@pytest.mark.parametrize(
    "value", [[0.6, 2.0], [0.6, True], ["0.6"], [float("nan")], [[0.6]], "0.6", 0.6, {"0": 0.6}]
)
@pytest.mark.parametrize("name", ["acceptance", "parent_acceptance"])
def test_a_list_of_which_one_entry_is_no_probability_is_ignored_as_a_whole(name, value):
    read = Calibration.of(SOUND | {name: value})
    assert getattr(read, name) == []
    assert read.problems == (f"{name} {NO_LIST}, got {value!r}",)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"parent": [3]}, "parent must be the number of a version, got [3]"),
        ({"parent": True}, "parent must be the number of a version, got True"),
        ({"acceptance_by_temperature": [0.5]}, "acceptance_by_temperature must be an object, got"),
        (
            {"acceptance_by_temperature": {"0": [0.9], "2": [0.5, -1]}},
            f"acceptance_by_temperature.2 {NO_LIST}, got [0.5, -1]",
        ),
    ],
)
def test_what_is_malformed_is_named(changed, problem):
    [said] = Calibration.of(SOUND | changed).problems
    assert said.startswith(problem)


def test_every_reader_takes_the_same_part_of_a_calibration_for_malformed():
    """One read only the first entry of each list, and took true for no number; another read all
    entries, and took true for 1; and a parent that cannot be a key ended the swap."""
    for value in ([0.6, 2.0], [True]):
        assert published_shifts(SOUND | {"acceptance": value}) == {}
        model = AcceptanceModel(200, DRAFTERS)
        before = model.hazards("eagle3", 0)
        VersionMemory(model, DRAFTERS).on_swap("eagle3", 1, {"acceptance": value, "parent": [3]})
        assert model.hazards("eagle3", 0) == before
    assert set(published_shifts(SOUND)) == {0, 2}
