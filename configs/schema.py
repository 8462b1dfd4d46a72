"""Everything that can be set, in one typed tree. One field, one description, one default.

Every model forbids unknown keys: a misspelt setting is an error, never a silent default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    """The HTTP face."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs ``server.api_key``."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port; 0 asks the system for a free one, which is then printed and written to run_dir."""
    api_key: str | None = None
    """Bearer key of every route but /health and /ready. ``None`` is allowed on loopback only."""
    model_name: str | None = None
    """Name in ``/v1/models`` and requests. ``None``: the last part of ``target``."""
    drain_s: float = Field(30.0, ge=0)
    """Seconds that in-flight requests get after SIGTERM before they are cancelled."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body accepted."""
    max_choices: int = Field(8, ge=1)
    """Largest ``n``."""


class EngineSettings(Section):
    """The decoding loop."""

    max_batch: int = Field(16, ge=1)
    """Most requests decoded in one step."""
    max_queue: int = Field(256, ge=1)
    """Most requests waiting for admission; one more is answered 429."""
    max_model_len: int = Field(2048, ge=16)
    """Most tokens (prompt and completion) of a request."""
    page_size: int = Field(16, ge=1)
    """Tokens of one KV page."""
    num_pages: int | None = Field(None, ge=2)
    """Pages of the KV pool. ``None``: enough for ``max_batch`` requests of ``max_model_len``,
    capped on a GPU by ``kv_memory_fraction``."""
    kv_memory_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of free GPU memory the KV pool may take."""
    prefill_chunk: int = Field(256, ge=1)
    """Most prompt tokens computed in one step, over all requests."""
    prefill_hold_ms: float = Field(10.0, ge=0)
    """Longest time that a short prompt waits for others while 16 or more requests decode: each
    program of prompts costs them about a step. 0: none waits. Where programs compute the steps."""
    prefix_cache: bool = True
    """Reuse KV pages of equal prefixes."""
    verification: Literal["block", "standard"] = "block"
    """Rule for sampled requests without a seed; both are exact. ``block`` keeps at least as many
    draft tokens."""
    programs: Literal["auto", "always", "never"] = "auto"
    """Compute steps by programs of fixed shape, which are CUDA graphs on a GPU, where a batch fits
    them. ``auto``: on a GPU only."""
    numerics: Literal["fast", "pinned"] = "fast"
    """``pinned``: what the target computes for a token depends, in no bit, on what is computed
    beside it, so that batches and drafts never decide a tie; slower, and for Llama and Qwen3 on a
    GPU only."""
    cpu_threads: int | None = Field(None, ge=1)
    """Threads of torch in the server process. ``None``: torch's own choice."""


class SuffixSettings(Section):
    """The training-free drafter: an index over the request and over recent traffic."""

    enabled: bool = True
    """Offer the suffix index to the policy as an arm of its own."""
    min_match: int = Field(2, ge=1)
    """Shortest suffix of the request that may be looked up."""
    max_match: int = Field(12, ge=1)
    """Longest suffix looked up."""
    recent_tokens: int = Field(400_000, ge=0)
    """Tokens of finished requests kept in the shared index; 0 keeps each request to itself."""


class DrafterSettings(Section):
    """The models that guess."""

    kind: Literal["eagle3", "suffix", "none"] = "eagle3"
    """``eagle3``: a trained drafter (and the suffix index beside it when enabled); ``suffix``:
    the index alone; ``none``: plain decoding."""
    path: Path | None = None
    """Bundle folder of the initial weights (version 0). ``None``: random weights."""
    max_draft: int = Field(8, ge=0, le=16)
    """Largest K that may be planned."""
    layer_ids: tuple[int, ...] | None = None
    """Tapped layers of a drafter that starts from random weights: residual stream after k decoder
    layers. ``None``: (2, N // 2, N - 3) for a target of N layers."""
    suffix: SuffixSettings = SuffixSettings()


class PolicySettings(Section):
    """How far to draft, and with which drafter."""

    kind: Literal["goodput", "fixed"] = "goodput"
    """``goodput``: argmax of expected tokens per second over (drafter, K), K=0 included;
    ``fixed``: always ``draft_k`` with ``drafter``."""
    draft_k: int = Field(4, ge=0, le=16)
    """K of the fixed policy."""
    drafter: Literal["eagle3", "suffix"] = "eagle3"
    """Drafter of the fixed policy."""
    explore: float = Field(0.02, ge=0, le=0.5)
    """Share of steps that try another arm, so that deep positions and idle drafters stay known."""
    half_life_rounds: float = Field(200.0, gt=0)
    """Rounds after which an old observation counts half."""
    margin: float = Field(1.02, ge=1)
    """Predicted speed over plain decoding that an arm needs before it is chosen."""


class CaptureSettings(Section):
    """What the server writes down of its traffic."""

    enabled: bool = True
    """Capture traces. A request may opt out by itself."""
    dtype: Literal["bfloat16", "float8_e4m3fn"] = "bfloat16"
    """Type of the logged hidden rows; fp8 carries one float32 scale a row."""
    ring_rows: int = Field(65_536, ge=1)
    """Hidden rows held in memory until their request is written down; older ones are dropped,
    counted."""
    queue_traces: int = Field(256, ge=1)
    """Finished traces waiting for the recorder; the oldest is dropped, counted, when full."""


class BufferSettings(Section):
    """What stands between server and trainer."""

    url: str = "log:"
    """``log:`` is the embedded segment log in ``run_dir/traces``; ``log:/some/folder`` is one in
    another folder. ``memory:NAME`` lives in one process and is for tests."""
    segment_bytes: int = Field(32 << 20, ge=4096)
    """Size at which a segment file is closed and the next begun."""
    max_bytes: int = Field(2 << 30, ge=4096)
    """Bytes of all segments; the oldest leave first."""
    ttl_s: float = Field(24 * 3600.0, gt=0)
    """Age at which a segment leaves."""
    sync_interval_s: float = Field(0.2, ge=0)
    """Longest time between two group commits (fdatasync)."""


class SwapSettings(Section):
    """How a published version enters the running server."""

    enabled: bool = True
    """Watch ``run_dir/weights`` and swap by itself; off: only ``POST /admin/drafter/swap``."""
    poll_s: float = Field(0.25, gt=0)
    """Seconds between two looks for a newer version."""
    watch_rounds: int = Field(200, ge=1)
    """Rounds of evidence wanted before a new version is judged against its parent."""
    max_drop: float = Field(0.15, gt=0, lt=1)
    """Relative loss of tokens_per_step, on the same traffic, that rolls a version back."""


class TrainerSettings(Section):
    """The asynchronous trainer."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    cpu_threads: int | None = Field(None, ge=1)
    """Threads of torch in the trainer process. ``None``: torch's own choice."""
    nice: int = Field(5, ge=0, le=19)
    """Niceness of the trainer process, so that it yields the cores to a server beside it."""
    lr: float = Field(3.0e-4, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    warmup_steps: int = Field(10, ge=0)
    batch_tokens: int = Field(2048, ge=16)
    """Tokens of one update."""
    max_sequence: int = Field(512, ge=16)
    """Longest piece of a trace that is trained on at once."""
    ttt_steps: int = Field(4, ge=1, le=8)
    """Passes of training-time test."""
    loss: Literal["lk", "forward_kl"] = "lk"
    """``lk``: LK hybrid with D-PACE weights; ``forward_kl``: KL(target || drafter)."""
    min_traces: int = Field(16, ge=1)
    """Traces wanted before the first update."""
    recent_traces: int = Field(256, ge=1)
    """Newest traces kept for training."""
    reservoir_traces: int = Field(256, ge=0)
    """Uniform sample of all older traces kept for training."""
    reservoir_share: float = Field(0.25, ge=0, lt=1)
    """Share of a batch drawn from the reservoir."""
    held_out_every: int = Field(8, ge=2)
    """One trace in so many is never trained on and judges candidates."""
    held_out_traces: int = Field(32, ge=1)
    """Newest held-out traces that judge a candidate."""
    publish_every_steps: int = Field(20, ge=1)
    """Updates between two candidates."""
    gate_margin: float = Field(1.005, gt=0)
    """Simulated tokens_per_step over the last published version that a candidate needs."""
    checkpoint_every_s: float = Field(30.0, gt=0)
    keep_versions: int = Field(8, ge=2)
    """Published versions kept on disk."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many updates. ``None``: run until told to stop."""
    replay_ratio: float = Field(4.0, gt=0)
    """Most times, on average, that a trained token is seen; the trainer waits for fresh traces
    beyond it."""


class Settings(Section):
    """The whole tree."""

    target: str = "examples/target"
    """Hugging Face id or folder of the target."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; where the server decodes."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of target and drafter. ``auto``: float32 on a CPU, bfloat16 on a GPU."""
    seed: int = 0
    """Seed of sampling without a request seed, of exploration and of random weights."""
    run_dir: Path = Path("runs/default")
    """Folder of this run: traces, weights, trainer, reports."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    drafter: DrafterSettings = DrafterSettings()
    policy: PolicySettings = PolicySettings()
    capture: CaptureSettings = CaptureSettings()
    buffer: BufferSettings = BufferSettings()
    swap: SwapSettings = SwapSettings()
    trainer: TrainerSettings = TrainerSettings()
