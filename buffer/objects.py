"""What a weights store needs of an object store, through fsspec.

Objects are written whole, and a name is **created** once: of several that create it, one succeeds.
How far that holds is the store's: S3 and Google's store refuse the others themselves, and so does
a folder; for other stores fsspec looks first and writes then, which two can do at once.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from buffer.interface import ServiceAwayError
from buffer.sealed import Content
from configs.urls import shown_scheme, shown_url, without_secrets

PIECE_BYTES = 2 << 20
_PIECES_AHEAD = 4
"""Pieces of an object that are fetched at the same time: one stream is far below what the line to
an object store carries."""
_ONE_CREATES = threading.Lock()
"""The file system in the memory of a process looks first and writes then, too."""


class Objects:
    """Objects below one URL."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: one of fsspec, e.g. ``s3://bucket/prefix``; credentials are those of its
                environment.

        Raises:
            ValueError: its protocol is unknown, or needs a package that is not installed.
        """
        protocol = url.partition("://")[0]
        self._url = url
        options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            # Listings and instances are cached otherwise, and versions of others never seen.
            self._fs, root = url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True, **options
            )
            problem = None
        except (ImportError, ValueError, TypeError, KeyError, OSError) as error:
            known = protocol in fsspec.available_protocols()
            what = "which needs a package" if known else "which fsspec does not know"
            said = without_secrets(str(error), url)
            problem = f"buffer.url names {shown_scheme(url) or 'a store'}://, {what}: {said}"
        if problem is not None:  # out here: what the library said of the URL may quote it
            raise ValueError(problem)
        self._root = root.rstrip("/")
        self.location = shown_url(f"{protocol}://{self._root.lstrip('/')}")

    def read(self, name: str, max_bytes: int | None = None) -> bytes | None:
        """Content of an object, its first ``max_bytes`` at most; ``None`` if there is none.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        with self._errors():
            try:
                content: bytes = self._fs.cat_file(self._path(name), start=0, end=max_bytes)
            except FileNotFoundError:
                return None
            return content

    def size(self, name: str) -> int | None:
        """Bytes of an object; ``None`` if there is none.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        with self._errors():
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def pieces(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """The first ``num_bytes`` of an object piece by piece, as far as they are there. The next
        ones are fetched meanwhile, on threads.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        starts = range(0, num_bytes, PIECE_BYTES)
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_PIECES_AHEAD, thread_name_prefix="pieces") as pool:
            try:
                for start in starts:
                    end = min(start + PIECE_BYTES, num_bytes)
                    waiting.append(pool.submit(self._piece, name, start, end))
                    if len(waiting) == _PIECES_AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for one in waiting:
                    one.cancel()

    def write(self, name: str, content: Content) -> None:
        """Store an object under a name that nobody reads yet.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        # Clients of S3 refuse a memoryview.
        plain = content if isinstance(self._fs, LocalFileSystem) else bytes(content)
        with self._errors():
            self._fs.pipe_file(self._path(name), plain)

    def create(self, name: str, content: bytes) -> bool:
        """Store an object, unless there is one of this name.

        Returns:
            Whether it was stored. ``False`` also if it was, but the answer was lost on the way and
            asked for again.

        Raises:
            ServiceAwayError: the store cannot be used; whether it was stored is unknown.
        """
        path = self._path(name)
        alone = _ONE_CREATES if isinstance(self._fs, MemoryFileSystem) else contextlib.nullcontext()
        with self._errors(), alone:
            try:
                if isinstance(self._fs, LocalFileSystem):
                    self._link(path, content)
                else:
                    self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

    def names(self, folder: str) -> list[str]:
        """Names of all that lies directly in a folder.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        with self._errors():
            try:
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def remove(self, name: str) -> None:
        """Remove an object, or all in a folder; nothing happens if there is none.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def refuses_a_second(self) -> bool:
        """Whether the store refuses to create a name again, tried with one that is removed.

        Raises:
            ServiceAwayError: the store cannot be used.
        """
        name = f"probe-{secrets.token_hex(8)}"
        try:
            return self.create(name, b"1") and not self.create(name, b"2")
        finally:
            self.remove(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _piece(self, name: str, start: int, end: int) -> bytes:
        with self._errors():
            try:
                content: bytes = self._fs.cat_file(self._path(name), start=start, end=end)
            except FileNotFoundError:
                return b""
            return content

    def _link(self, path: str, content: bytes) -> None:
        """Write aside and give it its name, which fails if there is one: a killed writer leaves no
        half of an object."""
        aside = f"{path}.{secrets.token_hex(8)}"
        self._fs.pipe_file(aside, content)
        try:
            self._fs.link(aside, path)
        finally:
            self._fs.rm_file(aside)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever else the client of a store raises says that the store cannot be used: each has
        errors of its own, few of them OSErrors."""
        try:
            yield
        except ServiceAwayError:
            raise
        except Exception as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            said = without_secrets(str(error), self._url)
            text = f"{self.location} cannot be used: {type(error).__name__}: {said}"
            problem = ServiceAwayError(number, text)
        else:
            return
        raise problem  # out here: what the client said may quote the URL
