"""The network of a policy: from a file, or published with a version of the drafter.

A published network belongs to the version that it came with: it was fitted to what that drafter's
drafts bring, or to those of versions not long before it, which it says. A version that brings none
has none, also when a server rolls back to it, and then the policy does what it does untrained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from buffer.tensors import MAX_BUNDLE_HEADER_BYTES, parse_header
from policies.weight_file import WeightFile, weights_of

T = TypeVar("T")

_DRAFTER, _OLDEST, _NEWEST = "drafter", "oldest_version", "newest_version"


def networks_of(calibration: Mapping[str, Any]) -> dict[str, str]:
    """The networks that came with a version: all of its calibration that is text."""
    return {key: value for key, value in calibration.items() if isinstance(value, str)}


@dataclass(frozen=True, slots=True)
class Origin:
    """The traces that a network was fitted to."""

    drafter: str
    oldest: int
    """Versions of the drafter that made them: from this one"""
    newest: int
    """to this one."""

    def metadata(self) -> dict[str, str]:
        """Entries of the metadata of a file of weights."""
        return {_DRAFTER: self.drafter, _OLDEST: str(self.oldest), _NEWEST: str(self.newest)}

    @classmethod
    def of_blob(cls, blob: bytes) -> Self | None:
        """What a file says of it; ``None``: nothing.

        Raises:
            ValueError: the file is damaged.
        """
        found = parse_header(blob, len(blob), MAX_BUNDLE_HEADER_BYTES).metadata
        drafter, oldest, newest = (found.get(key) for key in (_DRAFTER, _OLDEST, _NEWEST))
        if drafter is None or oldest is None or newest is None:
            return None
        if not (oldest.isdecimal() and newest.isdecimal()):
            raise ValueError(f"versions must be numbers, got {oldest!r} and {newest!r}")
        return cls(drafter, int(oldest), int(newest))


def _read(from_bytes: Callable[[bytes], T], blob: bytes, drafter: str | None) -> T:
    """
    Raises:
        ValueError: the file is damaged, or was fitted to drafts of another drafter than this one.
    """
    network, origin = from_bytes(blob), Origin.of_blob(blob)
    if drafter is not None and origin is not None and origin.drafter != drafter:
        raise ValueError(
            f"it was fitted to drafts of {origin.drafter!r}, and this policy drafts with "
            f"{drafter!r}"
        )
    return network


def network_of_file(
    setting: str,
    path: Path | None,
    from_bytes: Callable[[bytes], T],
    max_bytes: int,
    command: str,
    drafter: str | None = None,
) -> T | None:
    """The network in the file that a setting names; ``None`` if it names none.

    Args: as ``weights_of`` has them, and
        drafter: kind that the policy drafts with; ``None``: not known yet, any will do.

    Raises:
        SettingsError: the file cannot be used.
    """
    return weights_of(
        setting, path, lambda blob: _read(from_bytes, blob, drafter), max_bytes, command
    )


class Published(Generic[T]):
    """Holds the network in force."""

    def __init__(
        self,
        key: str,
        file: WeightFile,
        from_bytes: Callable[[bytes], T],
        drafter: str,
        network: T | None,
        takes_published: bool,
    ) -> None:
        """
        Args:
            key: of the network in the calibration that comes with a version.
            drafter: kind that the policy drafts with.
            network: before any version; ``None``: none.
            takes_published: otherwise ``network`` stays, whatever is published.
        """
        self.network = network
        self._key, self._file, self._from_bytes = key, file, from_bytes
        self._drafter, self._takes_published = drafter, takes_published
        self._origin: Origin | None = None
        self.problem: str | None = None
        """Why the network of the version in force was refused."""

    def on_swap(self, calibration: Mapping[str, Any]) -> None:
        """Take the network that comes with a version, or none. One that is damaged, or was fitted
        to another drafter, is none, and ``figures`` says why."""
        if not self._takes_published:
            return
        self.network = self._origin = self.problem = None
        if self._key not in calibration:
            return
        try:
            blob = self._file.blob_of(calibration[self._key])
            network = _read(self._from_bytes, blob, self._drafter)
            origin = Origin.of_blob(blob)
        except ValueError as error:
            self.problem = str(error)
            return
        self.network, self._origin = network, origin

    def figures(self, version: int | None) -> dict[str, Any]:
        """JSON-ready.

        Args:
            version: of the drafter now in force; ``None``: not known.
        """
        newest = None if self._origin is None else self._origin.newest
        return {
            "has_weights": self.network is not None,
            "problem": self.problem,
            "fitted_to_version": newest,
            "versions_since": None if newest is None or version is None else version - newest,
        }
