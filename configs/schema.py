"""All settings in one typed tree, each with its description and default.

Every section forbids unknown keys: a misspelt setting is an error, never a silent default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from configs.burst import BurstSettings
from configs.capture import CaptureSettings
from configs.drafters import BesideSettings, SuffixSettings
from configs.fitting import FittingSettings
from configs.launch import LaunchSettings
from configs.policies import (
    AdaEdlSettings,
    ConfidenceSettings,
    CuttingSettings,
    EmaTiersSettings,
    Exp3sSettings,
    HedgeSettings,
    LtdSettings,
    RaggedSettings,
    SpecDecPpSettings,
    TableSettings,
    ThompsonSettings,
    UcbSettings,
)
from configs.section import Section


class ServerSettings(Section):
    """HTTP server."""

    host: str = "127.0.0.1"
    """Address to bind. Any address other than loopback needs ``server.api_key``."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port. With 0 the system picks a free one, which is printed and written to ``run_dir``."""
    api_key: str | None = None
    """Bearer key required on every route except /health and /ready. ``None`` is allowed on loopback
    only."""
    model_name: str | None = None
    """Model name in ``/v1/models`` and in requests. ``None``: the last part of ``target``,
    without ``.gguf``."""
    drain_s: float = Field(30.0, ge=0)
    """Seconds that in-flight requests may continue after SIGTERM before they are cancelled."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body, in bytes."""
    max_choices: int = Field(8, ge=1)
    """Largest ``n``, the number of choices per request."""
    processes: int | None = Field(None, ge=0, le=64)
    """Processes that speak HTTP beside the engine's: they parse, tokenize and stream, so the
    engine's does nothing but decode. 0: the engine's process does it all. ``None``: with a GPU one
    if ``engine.max_batch`` is at most 32, two up to 128 and one more for every further 64, but at
    most one for every four cores and 4 in all; on a CPU, whose cores all decode, 0."""
    log_stats_s: float = Field(10.0, ge=0)
    """Seconds between log lines of throughput and acceptance, written while there is traffic; 0:
    none."""


class EngineSettings(Section):
    """Engine: batching, KV cache, verification."""

    max_batch: int = Field(16, ge=1)
    """Maximum number of requests decoded in one step."""
    max_queue: int = Field(256, ge=1)
    """Maximum number of requests waiting for admission; further ones are answered with 429."""
    max_model_len: int | None = Field(None, ge=16)
    """Maximum number of tokens of a request, prompt and completion together; at most the positions
    that the target was made for. ``None``: 2048, or what target and ``num_pages`` allow."""
    page_size: int = Field(16, ge=1)
    """Tokens per KV page."""
    num_pages: int | None = Field(None, ge=2)
    """Pages in the KV pool. ``None``: enough for ``max_batch`` requests of ``max_model_len``; on a
    GPU at most ``kv_memory_fraction`` of the free memory."""
    kv_memory_fraction: float = Field(0.5, gt=0, lt=1)
    """Largest fraction of free GPU memory for the KV pool."""
    prefill_chunk: int = Field(256, ge=1)
    """Maximum number of prompt tokens prefilled in one step, over all requests."""
    prefill_hold_ms: float = Field(10.0, ge=0)
    """Milliseconds that a short prompt may wait for others while 16 or more requests decode,
    because each prefill delays them by about a step. 0: prefill at once. On a GPU only."""
    prefix_cache: bool = True
    """Reuse the KV pages of identical prefixes."""
    verification: Literal["block", "standard"] = "block"
    """Verification rule for sampled requests without a seed. Both are exact; ``block`` accepts at
    least as many draft tokens."""
    numerics: Literal["fast", "pinned"] = "fast"
    """``pinned``: the target's output for a token is bitwise independent of the batch and of
    drafts, so that neither decides a tie. Slower; for Llama and Qwen3 on a GPU only."""
    draft_at_start: int | None = Field(None, ge=0)
    """Largest K whose programs a GPU makes before the server is ready, so that it starts faster.
    Those of larger K are made while it is idle, or one at a time between steps, in a twentieth of
    the time; until then drafts are no longer. ``None``: all are made before."""
    cpu_threads: int | None = Field(None, ge=1)
    """torch threads in the server process. ``None``: torch's default."""


class DraftModelSettings(Section):
    """Draft model: a causal LM of its own."""

    target_layers: int | None = Field(None, ge=1)
    """Without ``drafter.model``, new weights are so many of the target's first layers, with its
    final norm and lm_head. ``None``: a quarter of them."""


class DrafterSettings(Section):
    """Drafters."""

    kind: str = "eagle3"
    """A name in the catalog of drafters. ``eagle3``, ``mtp``: a trained drafter, with the suffix
    index beside it if that is enabled; ``draft_model``: a smaller causal LM, likewise; ``dflash``:
    a block of tokens in one pass, likewise; ``p_eagle``: EAGLE-3 with all its tokens in one pass,
    likewise; ``suffix``: the index alone; ``none``: plain decoding.
    See docs/drafters.md."""
    path: Path | None = None
    """Bundle folder with the initial weights (version 0), such as ``drafters import`` writes.
    ``None``: new weights."""
    model: str | None = None
    """Hugging Face id, folder or GGUF file of a causal LM with the target's tokenizer: what the new
    weights of ``draft_model`` are. ``None``: the target's first layers."""
    draft_model: DraftModelSettings = DraftModelSettings()
    init: Literal["auto", "random", "target"] = "auto"
    """What new weights are: ``random``, or the ``target``'s last decoder layer for the drafter's
    own, with the last tapped layer passed through (targets with Llama's layers), or for ``mtp`` the
    head in the target's checkpoint if there is one. ``auto``: the target's where it can be copied,
    as such a drafter learns faster."""
    draft_vocab: Path | None = None
    """JSON list of the token ids that new weights can propose, as ``trainer vocabulary`` writes it
    from traces. Fewer of them make drafting and training faster; a token outside is never
    proposed. ``None``: all."""
    max_draft: int = Field(8, ge=0, le=16)
    """Largest draft length K."""
    layer_ids: tuple[int, ...] | None = None
    """Layer ids tapped by new weights; id k is the residual stream
    after k decoder layers. ``None``: for a target of N layers (2, N // 2, N - 3), or N for
    ``mtp``."""
    suffix: SuffixSettings = SuffixSettings()
    beside: tuple[BesideSettings, ...] = ()
    """Further neural drafters in the same server, e.g. ``[{kind: mtp}]``. Each has rows, versions
    and figures of its own, and each that learns is trained. The policy chooses."""
    mixed: bool = True
    """With ``beside``: also draft for the requests of one step with different neural drafters,
    where that is measurably faster. It doubles or triples the number of programs."""
    former: bool = False
    """Keep the version before the newest one as a drafter of its own, ``KIND:former``, once there
    has been a swap, so that a policy that chooses among drafters, such as ``hedge``, can choose
    between both on the same traffic. Takes the memory of one more drafter: weights and keys."""
    on_request: tuple[str, ...] | None = None
    """Names in the catalog of drafters that draft only for requests that name them in
    ``speculation.drafters``. With a list, even an empty one, requests may choose their drafters;
    with ``None`` that field is refused, because a step uses only drafters that all of its requests
    allow, so one client could slow the others. For comparisons on one server."""


class PolicySettings(Section):
    """Choice of drafter and draft length."""

    kind: str = "goodput"
    """A name in the catalog of policies. ``goodput``: the (drafter, K) with the most expected
    tokens per second, K = 0 included; ``fixed``: always ``draft_k`` with ``drafter``. With
    ``drafter`` and a K that varies: ``table``: by batch; ``ema_tiers``: SGLang's adaptive steps;
    ``ucb``, ``thompson``, ``exp3s``: bandits; ``ltd``: a network that was fitted to traces.
    ``hedge``: among several neural drafters. With a K whose drafts the device cuts by request:
    ``confidence``, ``adaedl``, ``specdecpp``, ``ragged``. See docs/policies.md."""
    draft_k: int = Field(4, ge=0, le=16)
    """Draft length K of the fixed policy, and of those that cut it on the device."""
    drafter: str = "eagle3"
    """Drafter of the policies that decide on K alone, a name in the catalog of drafters."""
    explore: float = Field(0.05, ge=0, le=0.5)
    """Largest fraction of steps that explore, which keeps the estimates for deep positions and idle
    drafters current."""
    half_life_rounds: float = Field(200.0, gt=0)
    """Rounds after which the weight of an observation halves."""
    margin: float = Field(1.01, ge=1)
    """Predicted speedup over plain decoding that drafting must reach to be chosen."""
    probe_share: float = Field(0.005, gt=0, le=0.1)
    """Share of the time that ``goodput``, and the guard of other policies, may take to find out
    whether drafting pays while plain decoding is faster: drafts on trial, plans and lookups of
    matches, with their time on the host. What was taken is earned back before more is taken."""
    guard: bool = True
    """Hold policies without a floor of their own to plain decoding: they draft only while that is
    measurably faster. ``goodput`` has its own; ``fixed`` is never held."""
    random_share: float = Field(0.01, ge=0, le=0.5)
    """Share of steps in which ``ucb``, ``thompson`` and ``ltd`` take any K at random, and
    ``confidence``, ``adaedl`` and ``specdecpp`` cut nothing, so that other policies can be judged
    on their traces."""
    table: TableSettings = TableSettings()
    ema_tiers: EmaTiersSettings = EmaTiersSettings()
    ucb: UcbSettings = UcbSettings()
    thompson: ThompsonSettings = ThompsonSettings()
    exp3s: Exp3sSettings = Exp3sSettings()
    hedge: HedgeSettings = HedgeSettings()
    ltd: LtdSettings = LtdSettings()
    cutting: CuttingSettings = CuttingSettings()
    confidence: ConfidenceSettings = ConfidenceSettings()
    adaedl: AdaEdlSettings = AdaEdlSettings()
    specdecpp: SpecDecPpSettings = SpecDecPpSettings()
    ragged: RaggedSettings = RaggedSettings()


class BufferSettings(Section):
    """Trace log between server and trainer."""

    url: str = Field("log:", repr=False)
    """``log:`` is the embedded segment log in ``run_dir/traces``; ``log:/some/folder`` is one in
    another folder, and ``file:`` another name for ``log:``. ``log:?key_file=PATH`` or
    ``?key_env=NAME`` encrypts it. ``redis://host:port/db`` or
    ``rediss://...`` (TLS) is a Redis or Valkey server, ``kafka://host:port/prefix`` or
    ``kafkas://...`` (TLS) a Kafka cluster, for traces and weights; see docs/buffer.md.
    ``socket:`` or ``socket:/some/path`` is the memory of the trainer, which servers on the same
    machine reach over a Unix socket: no trace is on a disk. ``shm:`` also passes versions on in the
    memory of one host, ``s3://bucket/prefix`` and ``fsspec:URL`` keep them in an object store;
    traces are then in the log, or in the buffer of ``?traces=URL`` behind it. ``memory:NAME`` lives
    in one process and is for tests."""
    segment_bytes: int = Field(32 << 20, ge=4096)
    """Size at which a segment file is closed and the next one opened."""
    max_bytes: int | None = Field(None, ge=4096)
    """Maximum size of all segments together; the oldest are deleted first. ``None``: what an hour
    of traffic takes, as measured; at least 1 GiB and at most a tenth of the free disk. ``buffer
    inspect`` shows it."""
    ttl_s: float = Field(24 * 3600.0, gt=0)
    """Age in seconds at which a segment is deleted."""
    sync_interval_s: float = Field(0.2, ge=0)
    """Maximum seconds between two group commits (fdatasync)."""
    disk_spool_bytes: int | None = Field(None, ge=1 << 16)
    """With a service (Redis, Kafka): traces are written to ``run_dir/spool`` as well until the
    service has them, at most so many bytes, so that they outlive the server; the oldest are dropped
    and counted. ``None``: they wait in memory alone, see ``spool_bytes`` in docs/buffer.md."""


class SwapSettings(Section):
    """Swaps of a newly published drafter version into the running server."""

    enabled: bool = True
    """Watch ``run_dir/weights`` and swap automatically. Off: swap on ``POST /admin/drafter/swap``
    only."""
    poll_s: float = Field(0.25, gt=0)
    """Seconds between two checks for a newer version."""
    watch_rounds: int = Field(200, ge=1)
    """Rounds that a new version and its parent decode in turn, until it is certain which is better
    or both are about equal."""
    max_drop: float = Field(0.15, gt=0, lt=1)
    """Relative drop of tokens_per_step, on the same traffic, at which a version is rolled back; 0.7
    of it parts good versions from bad ones."""
    public_key: Path | None = None
    """PEM file with one or more Ed25519 public keys, as ``buffer keys`` writes it: only versions
    that one of them signed are taken. Needs the extra ``signatures``. ``None``: any sound one."""


class DeepSpeedSettings(Section):
    """How DeepSpeed divides a drafter over the processes of a trainer."""

    stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage. 0: every process holds everything, and DeepSpeed is not needed. 1: the moments of
    the optimizer are divided; 2: the gradients, too; 3: the weights, too. With one process it has
    no effect. 1 to 3 need ``pip install 'slipstream-serving[deepspeed]'``."""


class TrainerSettings(Section):
    """Asynchronous trainer."""

    group: str = Field("trainer", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")
    """Trainers of one group share the traces of the buffer, which remembers what they have learnt:
    each trace goes to one of them, and a new trainer begins with those that none has learnt. Each
    group gets all traces."""
    device: str = "auto"
    """Device of the trainer: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    cpu_threads: int | None = Field(None, ge=1)
    """torch threads in the trainer process. ``None``: torch's default."""
    nice: int = Field(5, ge=0, le=19)
    """Niceness of the trainer process; above 0 it yields CPU time to a server on the same
    machine."""
    duty: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Largest share of time in which the trainer works on updates and candidates. ``auto``: while a
    server of this run on this host decodes, as much as costs it ``max_serving_loss``; else all. 1:
    it never rests while it has traces to train on."""
    max_serving_loss: float = Field(0.05, gt=0, lt=1)
    """With ``duty: auto``, the share of its speed that a server may lose to the trainer's work."""
    burst: BurstSettings = BurstSettings()
    gpu_share: float = Field(1.0, gt=0, le=1)
    """Under CUDA MPS: share of the GPU's multiprocessors that the trainer may use, the others being
    the server's alone. Without MPS it has no effect. ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` in the
    trainer's environment takes its place."""
    memory_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the GPU's memory for the hidden rows of all traces that are held, which are uploaded
    once. If they do not fit, fewer traces are held."""
    memory_bytes: int = Field(1 << 30, ge=1 << 16)
    """The same bound in bytes where the trainer runs on a CPU."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the drafter's matrices and AdamW for the rest of it."""
    lr: float = Field(3.0e-4, gt=0)
    """Learning rate, of the same scale for both optimizers."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the optimizer."""
    grad_clip: float = Field(1.0, gt=0)
    """Maximum gradient norm."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises linearly to ``lr``."""
    average_decay: float = Field(0.998, ge=0, lt=1)
    """Candidates are a running average of the weights that keeps this share of itself at each
    update; 0.998 averages over about the last 500. It keeps less at first: (1 + n) / (10 + n) after
    n updates, which averages over the last ninth of them. 0: no averaging."""
    batch_tokens: int = Field(2048, ge=16)
    """Tokens per update. More of them use a GPU better, but a drafter learns faster from the same
    traces by smaller updates."""
    parts: int = Field(1, ge=1)
    """Parts into which each batch is divided; a process computes its share of them one after
    another, and their gradients are added up. More of them need less memory. Rounded up to a
    multiple of the number of processes; with the same number of parts, losses do not depend on the
    number of processes."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    max_sequence: int = Field(512, ge=16)
    """Maximum tokens of one training sequence, a piece of a trace."""
    ttt_steps: int = Field(4, ge=1, le=8)
    """Passes of training-time test (TTT) per update."""
    loss: str = "lk"
    """What the drafter minimises, a name in the catalog of objectives. ``lk``: LK hybrid;
    ``forward_kl``: KL(target || drafter); ``reverse_kl``: KL(drafter || target);
    ``total_variation``: 1 minus the acceptance. A draft's positions are weighted as its authors
    do (D-PACE, but for ``dflash``); ``lk_dpace``: by D-PACE; ``lk_equal``, ``forward_kl_equal``:
    all the same. ``lk_rejected_reverse_kl``, ``forward_kl_rejected_reverse_kl``: also reverse KL
    where drafts were rejected. See docs/drafters.md."""
    rejected_weight: float = Field(1.0, ge=1)
    """Weight of the loss at positions where a token of the drafter in training was rejected; it is
    1 elsewhere. From the third rejected draft in a row on, the excess is doubled. With
    ``*_rejected_reverse_kl`` the excess is the weight of reverse KL instead. 1: all positions weigh
    the same."""
    reward_weight: float = Field(0.0, ge=0)
    """Weight of a policy-gradient term in the loss: draft tokens that the target kept are rewarded,
    and the first one that it rejected in a round counts against the drafter. For kinds trained by
    training-time test (``eagle3``, ``mtp``). 0: there is no such term."""
    max_staleness: int | None = Field(None, ge=0)
    """Traces whose newest draft is of a version more than so many versions behind the newest
    published one are not trained on, and counted. ``None``: all are."""
    min_traces: int = Field(16, ge=1)
    """Traces to collect before the first update."""
    recent_traces: int = Field(256, ge=1)
    """Number of newest traces kept for training."""
    reservoir_traces: int = Field(256, ge=0)
    """Number of older traces kept for training, a uniform sample of all of them."""
    draw: str = "turns"
    """Which of the traces held are in a batch, a name in the catalog of draws. ``turns``: those
    trained on least often, and a share of all; ``uniform``: any of them; ``reservoir``: any that
    ever arrived, as far as they are held; ``recency``: newer ones more often; ``tenants``,
    ``domains``: each tenant or domain as often as the others; ``surprise``: those whose drafts were
    rejected more often."""
    reservoir_share: float = Field(0.25, ge=0, lt=1)
    """Fraction of a batch that ``turns`` draws from all traces held, however often they were
    trained on."""
    draw_half_life_traces: float = Field(256.0, gt=0)
    """With ``recency``, a trace is half as likely as one after which so many fewer arrived."""
    max_tenant_share: float | None = Field(None, gt=0, le=1)
    """Largest share that one tenant may have of the rows of a batch, whatever ``draw`` says.
    Batches get smaller, and with fewer tenants than 1 / share the trainer waits. ``None``: any."""
    max_domain_share: float | None = Field(None, gt=0, le=1)
    """The same for one ``domain``, which requests may name; those that name none are one domain."""
    held_out_every: int = Field(8, ge=2)
    """One in this many traces is held out from training, to evaluate candidates."""
    held_out_traces: int = Field(32, ge=1)
    """Number of newest held-out traces on which a candidate is evaluated."""
    publish_every_steps: int = Field(20, ge=1)
    """Updates after which a candidate is judged at the latest; twice and then four times as many
    after candidates that failed."""
    gate_share: float = Field(0.15, ge=0, lt=1)
    """Largest share of the time spent on judging candidates earlier: as soon as the figures of the
    updates have risen by what the last candidate lacked. 0: by the number of updates alone."""
    gate_margin: float = Field(1.005, gt=0)
    """Ratio of simulated tokens_per_step, candidate to last published version, required to
    publish; for a fitted network of ``ltd``, of its speed to that of what is in force. At 1, being
    equal is not enough."""
    gate_confidence: float = Field(0.9, ge=0.5, lt=1)
    """Probability with which a candidate must be no worse than the last published version, judged
    by how much the gain differs between held-out traces. 0.5: only the estimate counts."""
    policy: FittingSettings = FittingSettings()
    cool_down_s: float = Field(30.0, ge=0)
    """Seconds after a roll-back in which no candidate is judged; learning goes on."""
    learn: Literal["always", "on_drift"] = "always"
    """``on_drift``: learn until three candidates in a row are no better, then only once acceptance
    has fallen on live traffic. A trainer that starts from a version which has learnt measures that
    first."""
    payback_s: float | None = Field(None, gt=0)
    """Pause when learning has saved less of serving's time within so many seconds than it took, and
    go on once acceptance has fallen. They begin with its first work. ``None``: learn whether it
    pays or not."""
    checkpoint_every_s: float = Field(30.0, gt=0)
    """Seconds between two checkpoints of the trainer."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept on disk, each of 16 bytes for a parameter of the drafter; one more while the
    next is being written. With 1, a damaged one cannot be replaced by an older one."""
    keep_versions: int = Field(8, ge=2)
    """Number of published versions kept on disk."""
    signing_key: Path | None = None
    """PEM file with the Ed25519 private key that signs every version, readable by its owner alone;
    the trainer then continues only from versions that it signed. ``None``: versions are not signed.
    """
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many updates. ``None``: run until stopped."""
    replay_ratio: float = Field(4.0, gt=0)
    """Maximum average number of times a token is trained on; beyond it the trainer waits for new
    traces."""


class WandbSettings(Section):
    """Weights & Biases; needs the extra ``wandb``."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """``online``: server and trainer log to Weights & Biases, with the key in WANDB_API_KEY or from
    ``wandb login``; ``offline``: to files in ``run_dir/wandb`` that ``wandb sync`` sends later."""
    project: str = Field("slipstream", pattern=r"^[A-Za-z0-9._-]{1,128}$")
    """Project of the runs."""
    entity: str | None = None
    """User or team that owns the project. ``None``: that of the key."""
    artifacts: bool = False
    """Also keep every published version as an artifact. Weights learnt from traffic leave this
    machine with it."""


class TensorboardSettings(Section):
    """TensorBoard; needs the extra ``tensorboard``."""

    enabled: bool = False
    """Write event files to ``run_dir/tensorboard``."""


class ReportsSettings(Section):
    """What Weights & Biases and TensorBoard are told."""

    every_s: float = Field(5.0, ge=0.05)
    """Seconds between two reports of a server."""
    group: str | None = Field(None, pattern=r"^[^\x00-\x1f]{1,64}$")
    """Name that the server and the trainer of a run share. ``None``: the name of ``run_dir``."""
    domains: tuple[str, ...] = ()
    """Domains that are reported under their names, which clients choose; all others together are
    ``other``."""
    queue: int = Field(1000, ge=1)
    """Records that may wait for each writer. When full, the oldest is dropped and counted."""
    close_s: float = Field(10.0, ge=0)
    """Longest time that an ending server or trainer waits for each writer."""


class Settings(Section):
    """All settings."""

    target: str = "examples/target"
    """Hugging Face id, folder or GGUF file of the target. The default is the bundled target, which
    is in the repository only: with an installed wheel, name one."""
    target_cache: Path | None = None
    """Folder for targets converted from GGUF files, of server and trainer alike; each file is
    converted once. Servers also keep tokenizers there that ``transformers`` has made. ``None``:
    ``slipstream/targets`` in the user's cache folder (XDG_CACHE_HOME, else ``~/.cache``)."""
    device: str = "auto"
    """Device of the server: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """dtype of target and drafter. ``auto``: float32 on a CPU, bfloat16 on a GPU."""
    seed: int = 0
    """Seed for requests without their own, for exploration and for random weights."""
    run_dir: Path = Path("runs/default")
    """Folder of the run: traces, weights, trainer state, reports."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines that server and trainer write to stderr."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    drafter: DrafterSettings = DrafterSettings()
    policy: PolicySettings = PolicySettings()
    capture: CaptureSettings = CaptureSettings()
    buffer: BufferSettings = BufferSettings()
    swap: SwapSettings = SwapSettings()
    trainer: TrainerSettings = TrainerSettings()
    wandb: WandbSettings = WandbSettings()
    tensorboard: TensorboardSettings = TensorboardSettings()
    reports: ReportsSettings = ReportsSettings()
    launch: LaunchSettings = LaunchSettings()
