"""Settings say which drafters a server runs, and which of them draft on request only."""

from __future__ import annotations

import pytest

from configs.choices import SettingsError
from configs.schema import DrafterSettings, Settings
from drafters.catalog import chosen, kind_of, mixes, on_request, placed
from drafters.several import learning, line_of, settings_of


def settings_with(**values) -> DrafterSettings:
    return DrafterSettings.model_validate(values)


def test_kinds_on_request_come_last_and_once():
    settings = settings_with(on_request=("suffix_request", "suffix", "suffix_request"))

    assert chosen(settings) == ("eagle3", "suffix", "suffix_request")
    assert on_request(settings) == ("suffix_request",)
    assert chosen(settings_with()) == ("eagle3", "suffix")


def test_an_unknown_kind_on_request_names_the_setting():
    with pytest.raises(SettingsError, match=r"drafter\.on_request 'sufix'.*did you mean 'suffix'"):
        chosen(settings_with(on_request=("sufix",)))


def test_drafters_beside_the_main_one_come_after_it_and_mix_with_it():
    settings = settings_with(beside=[{"kind": "mtp"}, {"kind": "dflash"}])

    assert chosen(settings) == ("eagle3", "mtp", "dflash", "suffix")
    assert mixes(settings, on_gpu=False) == {"eagle3+mtp+dflash": ("eagle3", "mtp", "dflash")}
    assert mixes(settings_with(beside=[{"kind": "mtp"}], mixed=False), on_gpu=False) == {}
    assert mixes(settings_with(), on_gpu=False) == {}


def test_the_index_mixes_with_neural_drafters_if_settings_say_so():
    both = {"beside": [{"kind": "mtp"}]}
    mixed = {"mixed": True}

    assert mixes(settings_with(suffix=mixed), on_gpu=False) == {
        "eagle3+suffix": ("eagle3", "suffix")
    }
    assert mixes(settings_with(suffix=mixed, **both), on_gpu=False) == {
        "eagle3+mtp": ("eagle3", "mtp"),
        "eagle3+mtp+suffix": ("eagle3", "mtp", "suffix"),
    }
    assert list(mixes(settings_with(suffix=mixed, mixed=False, **both), on_gpu=False)) == [
        "eagle3+mtp+suffix"
    ]
    assert mixes(settings_with(kind="suffix_request", suffix=mixed), on_gpu=False) == {}


def test_the_index_mixes_by_itself_where_it_looks_on_the_device():
    there = {"place": "device"}

    assert mixes(settings_with(), on_gpu=True) == {"eagle3+suffix": ("eagle3", "suffix")}
    assert mixes(settings_with(suffix=there), on_gpu=False) == {
        "eagle3+suffix": ("eagle3", "suffix")
    }
    assert mixes(settings_with(suffix={"place": "host"}), on_gpu=True) == {}
    assert mixes(settings_with(suffix={"mixed": False}), on_gpu=True) == {}
    assert mixes(settings_with(suffix={"enabled": False}), on_gpu=True) == {}
    assert mixes(settings_with(kind="none"), on_gpu=True) == {}
    assert mixes(settings_with(), on_gpu=True, are_cut=True) == {}
    # The drafter alone is what its former version is held against.
    assert list(mixes(settings_with(former=True), on_gpu=True)) == ["eagle3+eagle3:former"]
    assert len(mixes(settings_with(suffix={"mixed": True}), on_gpu=True, are_cut=True)) == 1


def test_a_drafter_beside_must_be_neural_and_known():
    with pytest.raises(SettingsError, match=r"drafter\.beside names 'suffix', which is not neural"):
        chosen(settings_with(beside=[{"kind": "suffix"}]))
    with pytest.raises(SettingsError, match=r"drafter\.beside 'mpt'.*did you mean 'mtp'"):
        chosen(settings_with(beside=[{"kind": "mpt"}]))


def test_each_drafter_has_settings_and_a_version_line_of_its_own():
    own = {"kind": "mtp", "init": "random", "layer_ids": [4]}
    settings = Settings(drafter=settings_with(path="first", max_draft=5, beside=[own]))

    second = settings_of(settings, "mtp").drafter

    assert learning(settings) == ("eagle3", "mtp")
    assert [line_of(settings, kind) for kind in learning(settings)] == ["", "mtp"]
    assert settings_of(settings, "eagle3") is settings
    assert (second.kind, second.path, second.init, second.layer_ids) == (
        "mtp",
        None,
        "random",
        (4,),
    )
    assert (second.max_draft, second.beside) == (5, ())


def test_a_drafter_that_learns_on_request_has_a_line_of_its_own_too():
    settings = Settings(drafter=settings_with(path="first", on_request=("mtp",)))

    assert line_of(settings, "mtp") == "mtp"
    assert settings_of(settings, "mtp").drafter.path is None


def test_the_index_is_where_the_server_decodes_unless_settings_say_otherwise():
    def is_there(place, *, on_gpu):
        settings = settings_with(suffix={"place": place})
        return placed("suffix", settings, on_gpu=on_gpu) is kind_of("suffix").on_device

    assert [is_there("auto", on_gpu=there) for there in (False, True)] == [False, True]
    assert [is_there("device", on_gpu=there) for there in (False, True)] == [True, True]
    assert [is_there("host", on_gpu=there) for there in (False, True)] == [False, False]
    assert placed("eagle3", settings_with(), on_gpu=True) is kind_of("eagle3")
