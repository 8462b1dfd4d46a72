"""What a store of drafter versions can do, whatever backend holds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Protocol

from buffer.bundles import Bundle, BundleError, BundleInBuffer, ExpectedTensors, HostBuffer
from buffer.records import Manifest
from buffer.sealed import Content, Sealed


class SupersededError(ValueError):
    """Another trainer has taken over the weights store."""

    def __init__(self, location: str, epoch: int, newest: int) -> None:
        super().__init__(
            f"another trainer took over {location} (epoch {newest}, ours is {epoch}): nothing is "
            f"published. Let one trainer run, or give each a weights store of its own"
        )


class StoreDamagedError(ValueError):
    """What a store holds cannot be used. Its trainer must not go on; a server needs none of it."""


class WeightsStore(Protocol):
    """Published versions of a drafter, each with its manifest and files."""

    @property
    def location(self) -> str:
        """Where the versions are stored, for messages."""
        ...

    def versions(self) -> list[int]:
        """Stored versions, ascending. Listed, not checked."""
        ...

    def next_version(self) -> int:
        """Lowest version that may still be published; 0 in an empty store.

        Raises:
            ValueError: the store no longer knows which versions were used.
        """
        ...

    def take_over(self) -> int:
        """Become the one that publishes, in place of any other trainer.

        Returns:
            The new epoch, higher than all before, for ``publish``.

        Raises:
            OSError: storage failed.
        """
        ...

    def lend(self, num_bytes: int) -> memoryview | None:
        """Memory for the tensors of the next version, which need not be copied if they are made
        in it: see ``sealed.seal_in``. Give what was made to ``prepare``, and publish it before the
        next ``lend``, whose memory may be the same.

        Only the one that publishes may call it.

        Args:
            num_bytes: size of the file.

        Returns:
            ``None``: the store has none, or cannot get so much.
        """
        return None

    def prepare(self, content: Sealed) -> None:
        """Begin to write the tensors of the next version, which ``publish`` will probably get,
        where nobody looks for them yet. Saves time in stores whose first step is to copy them;
        others do nothing. Does not raise: what fails is done again by ``publish``.

        Only the one that publishes may call it. What is prepared and not published is dropped by
        the next ``prepare`` or ``publish``.
        """
        return

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        """Make a new version visible, whole or not at all.

        Of several that publish the same version, or versions out of order, at once, one succeeds
        and the others are refused.

        Args:
            manifest: everything but ``files``, which is filled in here.
            files: name -> content; ``drafter.safetensors`` must be among them. What is ``sealed``
                is digested no more.
            epoch: what ``take_over`` returned; ``None``: publish whoever has taken over.

        Returns:
            The manifest as published.

        Raises:
            SupersededError: somebody took over after ``epoch``; nothing was published.
            ValueError: this version or a higher one was published before, or the manifest or a file
                would be refused on reading.
            OSError: storage failed. Nothing was published, unless an answer was lost on the way:
                ``next_version`` tells.
        """
        ...

    def read_manifest(self, version: int) -> Manifest:
        """The manifest alone, checked.

        Raises:
            BundleError: there is no such version, or its manifest is damaged.
        """
        ...

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        """Read a version into memory and check all of it.

        Args:
            version: the version.
            expected: tensors that ``drafter.safetensors`` must hold, and no others.

        Raises:
            BundleError: names what was found.
        """
        ...

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        """Like ``read``, but into memory that is reused from version to version.

        Meant for a thread beside others that cannot wait: it allocates no large memory once
        ``host`` has grown, and holds the interpreter lock only briefly.

        Raises:
            BundleError: as ``read``.
        """
        ...

    def change_mark(self, version: int) -> Hashable:
        """A value that changes whenever the stored version does. Cheap; no content is read.

        Raises:
            OSError: storage failed.
        """
        ...

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Call ``notify`` on a thread of the store soon after a version was published.

        A hint that saves waiting for the next look, not a promise: look from time to time anyway.
        Does nothing in a store that cannot tell.

        Returns:
            Ends it.
        """
        return lambda: None

    def newest_sound(self) -> tuple[Bundle, list[str]]:
        """The newest version that is undamaged and was not rolled back, and why newer ones were
        passed over.

        Raises:
            StoreDamagedError: there is none.
            ValueError: likewise, and one was refused for its signature: somebody should look at it.
        """
        denied = self.read_denied()
        problems, is_damage = [], True
        for version in reversed(self.versions()):
            if version in denied:
                problems.append(f"version {version} was rolled back.")
                continue
            try:
                return self.read(version), problems
            except BundleError as error:
                problems.append(str(error))
                is_damage = is_damage and error.reason == "damaged"
        reasons = " ".join(problems) or "it is empty"
        why = f"no version in {self.location} can be used: {reasons}"
        raise StoreDamagedError(why) if is_damage else ValueError(why)

    def read_denied(self) -> set[int]:
        """Versions that a server rolled back from; nobody starts with them.

        Raises:
            StoreDamagedError: the stored list cannot be used.
        """
        ...

    def write_denied(self, denied: Collection[int]) -> None:
        """Replace the list that ``read_denied`` returns."""
        ...

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        """Protect the versions that a server uses, or may roll back to, from ``prune``.

        Call it before reading a version, and at least hourly after that: a store that outlives its
        servers drops marks that have not been renewed for a day.

        Raises:
            ValueError: ``producer`` is not a plain name.
        """
        ...

    def unmark_in_use(self, producer: str) -> None:
        """Remove a server's mark; called when it stops."""
        ...

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        """Remove old versions, and return them.

        The newest ``keep`` stay, and so do versions ``in_use`` or marked by servers, with their
        parents, and version 0.

        Raises:
            ValueError: ``keep`` is below 1.
        """
        ...
