"""The catalog of buffer backends: URL scheme -> class that opens it."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from buffer.disk_spool import WINDOW_BYTES, DiskSpool
from buffer.interface import Backend, TraceLimits, TraceWriter
from configs.schema import BufferSettings
from configs.urls import shown_scheme, without_secrets

# Named by module and class, so that a backend's client library is imported only when it is used.
CATALOG: dict[str, str] = {
    "log": "buffer.embedded_log:EmbeddedLog",
    "file": "buffer.embedded_log:EmbeddedLog",
    "redis": "buffer.redis_buffer:RedisBuffer",
    "rediss": "buffer.redis_buffer:RedisBuffer",
    "kafka": "buffer.kafka:KafkaBackend",
    "kafkas": "buffer.kafka:KafkaBackend",
    "socket": "buffer.socket_buffer:SocketBackend",
    "memory": "buffer.memory:MemoryBackend",
    "shm": "buffer.shared_memory:SharedMemory",
    "s3": "buffer.object_store:ObjectStore",
    "fsspec": "buffer.object_store:ObjectStore",
}


def open_backend(url: str, run_dir: Path) -> Backend:
    """Open the backend that ``buffer.url`` names.

    Args:
        url: scheme, colon and a part that the backend interprets, e.g. ``log:``.
        run_dir: folder of the run.

    Raises:
        ValueError: the scheme is unknown, or its backend refuses the rest.
    """
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in CATALOG:
        known = ", ".join(f"'{name}:'" for name in CATALOG)
        named = shown_scheme(url)
        unknown = "its scheme is unknown" if named is None else f"scheme {named!r} is unknown"
        found = unknown if colon else "it has no scheme"
        # Never the URL itself: it may hold a password.
        raise ValueError(f"buffer.url cannot be used: {found}; known are {known}")
    try:
        backend: Backend = resolve_name(CATALOG[scheme])(url, run_dir)
        return backend
    except ModuleNotFoundError as error:
        problem = (
            f"buffer.url begins with '{scheme}:', which needs the package {error.name}; pip "
            f"install {error.name}"
        )
    except ValueError as error:
        problem = without_secrets(str(error), url, but=(scheme,))
    raise ValueError(problem)  # out here: what a library said of the URL may quote it


def limits_of(settings: BufferSettings) -> TraceLimits:
    """What these settings allow the log.

    Raises:
        ValueError: the log would hold less than two segments.
    """
    return TraceLimits(
        settings.segment_bytes, settings.max_bytes, settings.ttl_s, settings.sync_interval_s
    )


def open_trace_writer(backend: Backend, settings: BufferSettings, run_dir: Path) -> TraceWriter:
    """A writer for this process, with a spool on the disk if the settings ask for one.

    Raises:
        ValueError: the log would hold less than two segments, or ``buffer.disk_spool_bytes`` is set
            for a backend that has no service to wait for.
        OSError: storage failed.
    """
    limits = limits_of(settings)
    if settings.disk_spool_bytes is None:
        return backend.open_trace_writer(limits)
    if backend.spool_bytes is None:
        scheme = settings.url.partition(":")[0]
        raise ValueError(
            f"buffer.disk_spool_bytes is for records that wait for a service, and '{scheme}:' has "
            f"none: it writes to the disk itself. Remove the setting"
        )
    return DiskSpool(
        backend.open_trace_writer(limits),
        run_dir / "spool",
        limits,
        settings.disk_spool_bytes,
        window_bytes=min(WINDOW_BYTES, backend.spool_bytes // 2),
    )
