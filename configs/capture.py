"""Settings of what a server captures of its traffic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.section import Section


class CaptureSettings(Section):
    """Capture of traces for the trainer."""

    enabled: bool = True
    """Capture traces. A single request opts out with ``"capture": false``."""
    tenants: tuple[str, ...] | None = None
    """Tenants (the ``user`` of a request; ``default`` without one) whose traffic is captured.
    ``None``: everybody's."""
    excluded_tenants: tuple[str, ...] = ()
    """Tenants whose traffic is never captured, whatever ``capture.tenants`` says. It enters neither
    traces nor the shared suffix index."""
    redact: str | None = None
    """A Python function as ``module:function`` that sees each trace before it leaves the server:
    it gets a ``buffer.records.Trace`` and returns one, changed or not, or ``None`` to keep it back.
    Traces for which it raises are dropped; both are counted. It runs beside the engine, on a thread
    of its own. ``None``: traces are written as they are."""
    memory_only: bool = False
    """Refuse every setting with which prompts, token ids or hidden rows could reach a disk:
    ``buffer.url`` must be ``socket:``. Turns core dumps off."""
    dtype: Literal["bfloat16", "float8_e4m3fn"] = "bfloat16"
    """Type of the captured hidden rows. fp8 halves memory, log and reading, and adds one float32
    scale per vector."""
    process: bool | None = None
    """Encode and write traces in a process of its own, so that the engine's process does nothing
    but steps. It holds no model and takes some 80 MB. ``None``: on a GPU, where a step takes a
    millisecond or two, unless ``buffer.url`` is ``memory:``, which no other process can share."""
    ring_rows: int | None = Field(None, ge=1)
    """Hidden rows held in memory until their request finishes and is recorded. When full, the
    oldest are dropped and counted. ``None``: as many as ``engine.max_batch`` requests of
    ``engine.max_model_len``, up to 2048, tokens have; at most a sixteenth of the host's memory."""
    queue_traces: int = Field(1024, ge=1)
    """Maximum number of finished traces waiting for the recorder. When full, the oldest is dropped
    and counted."""
