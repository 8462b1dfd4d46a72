"""Names that are chosen on a command line."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import typer


def known(what: str, names: Iterable[str], all_names: Collection[str]) -> list[str]:
    """The names, if there are such.

    Raises:
        typer.BadParameter: one is unknown; says which, and what there is.
    """
    chosen = list(names)
    if unknown := sorted(set(chosen) - set(all_names)):
        raise typer.BadParameter(f"unknown {what} {unknown}; known: {'; '.join(all_names)}")
    return chosen
