"""The catalog of writers: name -> module and name of its ``WriterKind``.

A new one is a file beside this one, with a ``KIND``, and one line here; its settings are a section
of ``configs/schema.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pkgutil import resolve_name

from configs.choices import SettingsError
from configs.schema import Settings
from reporting.interface import WriterKind

CATALOG: dict[str, str] = {
    "wandb": "reporting.wandb_writer:KIND",
    "tensorboard": "reporting.tensorboard_writer:KIND",
}


@cache
def writer_kind(name: str) -> WriterKind:
    """The writer of this name; ``name`` must be in the catalog."""
    kind: WriterKind = resolve_name(CATALOG[name])
    return kind


def asked_for(settings: Settings) -> Iterator[str]:
    """Names of the writers that the settings ask for."""
    return (name for name in CATALOG if writer_kind(name).asked_by(settings) is not None)


def check_writers(settings: Settings) -> None:
    """
    Raises:
        SettingsError: the settings ask for a writer whose extra is not installed.
    """
    for name in asked_for(settings):
        kind = writer_kind(name)
        if find_spec(kind.module) is None:
            raise SettingsError(
                f"{kind.asked_by(settings)} needs the package {kind.module}, which is not "
                f"installed: pip install 'slipstream-serving[{kind.extra}]'"
            )
