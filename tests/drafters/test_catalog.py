"""Settings say which drafters a server runs, and which of them draft on request only."""

from __future__ import annotations

import pytest

from configs.choices import SettingsError
from configs.schema import DrafterSettings
from drafters.catalog import chosen, on_request


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
