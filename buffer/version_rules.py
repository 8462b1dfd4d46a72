"""Rules about versions, and about names, that every backend follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from buffer.weights_store import SupersededError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_unused(version: int, lowest: int) -> None:
    """Refuse a version that may have been used before.

    Args:
        version: the version to publish.
        lowest: lowest version that may still be published.

    Raises:
        ValueError: says which versions are free.
    """
    if version < lowest:
        raise ValueError(
            f"version {version} cannot be published: {lowest - 1} was published before, and "
            f"versions are never reused. Publish as version {lowest} or higher"
        )


def check_may_publish(
    location: str, version: int, lowest: int, epoch: int | None, newest: int
) -> None:
    """Refuse a publisher that was superseded, and a version that may have been used before.

    Args:
        location: of the store, for messages.
        lowest: lowest version that may still be published.
        epoch: of the publisher; ``None``: it has none, and is not refused.
        newest: newest epoch of the store.

    Raises:
        SupersededError, ValueError: it may not publish.
    """
    if epoch is not None and newest > epoch:
        raise SupersededError(location, epoch, newest)
    check_unused(version, lowest)


def check_producer(producer: str) -> None:
    """Refuse a producer name that is not a plain file name.

    Raises:
        ValueError: says which names are allowed.
    """
    _check_plain("producer", producer)


def check_group(group: str) -> None:
    """Refuse a name of a group of readers that is not a plain file name.

    Raises:
        ValueError: says which names are allowed.
    """
    _check_plain("group", group)


def _check_plain(what: str, name: str) -> None:
    if not _PLAIN_NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{what} must match {_PLAIN_NAME.pattern}, got {name!r}")


def check_keep(keep: int) -> None:
    """Refuse to prune everything.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}: the newest version always stays")


def versions_to_prune(
    present: list[int], keep: int, used: Collection[int], parent_of: Callable[[int], int | None]
) -> list[int]:
    """Versions to remove: all but the newest ``keep``, those in use, the parents of the latter, and
    version 0, the drafter that was shipped.

    Args:
        present: stored versions, ascending.
        keep: number of newest versions that stay.
        used: versions in use; they need not be present.
        parent_of: parent of a present version, ``None`` if it has none or is damaged.
    """
    parents = {parent_of(version) for version in used if version in present}
    kept = {0, *present[-keep:], *used, *parents}
    return [version for version in present if version not in kept]
