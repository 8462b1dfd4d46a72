"""Builds a running service from settings."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from buffer.audit import audit
from buffer.backends import open_backend
from buffer.interface import Backend
from buffer.load import open_writer as open_load
from buffer.run_target import former_of
from configs.ahead import Ahead
from configs.capture import CaptureSettings
from configs.phases import timed
from configs.schema import Settings
from drafters.catalog import base_of, chosen, kind_of, mixes, on_request, placed
from drafters.initial import TargetFacts
from drafters.protocol import (
    DrafterContext,
    HostDrafter,
    NeuralDrafter,
    TextDrafter,
    Traits,
    Weights,
)
from drafters.several import settings_of
from policies.arms import ArmPolicies
from policies.catalog import build_policy, cuts_of
from policies.interface import CostSample, DraftPolicy
from policies.savings import Savings, TimesPlainSteps
from serving.capture.apart import RecorderProcess, Spawned, spawn
from serving.capture.opening import memory_bytes, open_recorder
from serving.capture.recorder import Recorder
from serving.capture.redaction import Redaction, redaction_of
from serving.capture.traces import Producer, TraceMaker
from serving.engine.assembly import Choices, assemble
from serving.engine.capture_ring import ROUNDS_ON_THE_WAY, CaptureRing
from serving.engine.drafter_rows import BLOCK
from serving.engine.inbox import Sequences
from serving.engine.lanes import table_bytes_of
from serving.engine.loop import Engine, EngineParts, Listeners
from serving.engine.programs import Sizes, fuse
from serving.engine.shared_memory import can_share
from serving.kept_profile import facts_of, kept_or_measured
from serving.learning import Learning, all_of, first_versions, flat_weights, shapes_of, swappers
from serving.model_len import model_len, with_model_len
from serving.profile import profile_steps
from serving.served_model import ServedModel
from serving.service import Service
from serving.swap.flat_weights import FlatWeights
from serving.swap.swapper import Swapper
from serving.swap.target_update import InForce, TargetUpdates
from specops.verify_logits import Rule
from targets.device import hardware_of, pick_device
from targets.files import TargetFiles, read_target
from targets.fits import check_tokenizer, known_eos_ids, warn_of_template
from targets.load import load_served_model, pick_dtype
from targets.target import Target
from targets.update import TargetWeights

log = logging.getLogger(__name__)

_PROFILE_REPEATS = 5
_CPU_PROFILE_REPEATS = 3  # a step takes ten times as long there
_PROFILE_CONTEXT = 128
KERNELS_FILE = "kernels.json"
"""In the run folder: the kernels that the last start needed."""
_RING_TOKENS = 2048
"""Tokens of a long request: the ring holds so many rows for each that decodes. Typical ones are a
tenth as long, and the rest of the ring is how far the recorder may fall behind."""
_RING_SHARE = 1 / 16  # of the host's memory, at most


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A target in memory, on the device that decodes."""

    model: Any
    """A causal LM in its serving dtype, of Hugging Face or an ``OwnCausalLM``; the engine takes it
    over."""
    tokenizer: Any
    fingerprint: str
    """64 hex digits that tie drafters and traces to it."""
    name: str
    """Its name in the API unless ``server.model_name`` says otherwise."""
    folder: str | None = None
    """Where it was read from; ``None``: it was made in memory."""


def load_target(settings: Settings, files: TargetFiles | None = None) -> LoadedTarget:
    """Load the target that the settings name.

    Args:
        files: what was read of it; ``None``: it is read now.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    device = pick_device(settings.device)
    if files is None:
        files = read_target(settings.target, settings.target_cache)
    folder, config = files.folder, files.config
    with_model_len(settings, config)  # refused before the weights are read
    check_tokenizer(files.tokenizer, config)
    warn_of_template(files.tokenizer, folder)
    model = load_served_model(folder, config, pick_dtype(settings.dtype, device), device)
    return LoadedTarget(
        model, files.tokenizer, files.fingerprint, files.name, str(folder.absolute())
    )


def build_service(
    settings: Settings,
    loaded: LoadedTarget | None = None,
    wrap: Callable[[DraftPolicy], DraftPolicy] | None = None,
    *,
    files: TargetFiles | None = None,
) -> Service:
    """Load everything, measure step times, and return a service that is ready to start.

    Args:
        loaded: serve this target; ``None``: load the one that the settings name.
        wrap: returns the policy to decide with, given the one that the settings name.
        files: what was read of the target that the settings name; ``None``: it is read now.

    Raises:
        ValueError: the target or the drafter cannot be used; the message says why.
    """
    apart = spawn() if _records_apart(settings) else None  # it imports while the target loads
    try:
        return _built(settings, loaded, wrap, files, apart)
    except BaseException:
        if apart is not None:
            apart.end()
        raise


def _records_apart(settings: Settings) -> bool:
    """Whether traces are written by another process."""
    if not settings.capture.enabled or not chosen(settings.drafter):
        return False
    if settings.capture.process is None:
        is_seen = not settings.buffer.url.startswith("memory:")
        return is_seen and can_share() and pick_device(settings.device).type == "cuda"
    return settings.capture.process


def _built(
    settings: Settings,
    loaded: LoadedTarget | None,
    wrap: Callable[[DraftPolicy], DraftPolicy] | None,
    files: TargetFiles | None,
    apart: Spawned | None,
) -> Service:
    if settings.engine.cpu_threads is not None:
        torch.set_num_threads(settings.engine.cpu_threads)
    torch.set_flush_denormal(True)
    redaction = redaction_of(settings.capture)
    kinds = chosen(settings.drafter)
    if loaded is None:
        with timed("loaded the target", "loading the target"):
            loaded = load_target(settings, files)
    settings = with_model_len(settings, loaded.model.config)
    backend = open_backend(settings.buffer.url, settings.run_dir)
    with timed("read and checked the drafter"):
        lm_head = loaded.model.get_output_embeddings().weight
        former = former_of(settings.run_dir, loaded.fingerprint)
        facts_of_target = TargetFacts(loaded.model.config, lm_head, loaded.fingerprint, former)
        learning = first_versions(settings, facts_of_target, backend)
    parts, flat = _make_parts(settings, loaded, kinds, learning, is_shared=apart is not None)
    limits = parts.inbox.limits
    model = ServedModel(
        model_name=settings.server.model_name or loaded.name,
        tokenizer=loaded.tokenizer,
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        max_draft=settings.drafter.max_draft,
        drafters=None if settings.drafter.on_request is None else kinds,
        created_unix_s=int(time.time()),
    )
    drafting = parts.programs.drafting
    traits = {kind: drafting.drafters[kind].traits for kind in kinds}
    mixed = {name: rows.kinds for name, rows in drafting.mixes.items()}
    policies = _policies(settings, traits, mixed, wrap)
    if policies.wants_profile:
        together = "".join(f"; mixed {name}" for name in mixed)
        places = "".join(f"; {kind} on the device" for kind in drafting.texts)
        shape = f"{kinds} {shapes_of(learning)}{together}{places}"
        facts = facts_of(settings, loaded.fingerprint, parts.programs.target.device, shape)
        with timed("found step times", "finding step times"):
            policies.calibrate(
                kept_or_measured(settings.run_dir, facts, lambda: _profile(settings, parts))
            )
    for kind, one in learning.items():
        policies.on_swap(kind, one.manifest.version, one.manifest.policy)
    return _service(
        settings, backend, model, parts, policies, learning, flat, loaded, redaction, apart
    )


def _policies(
    settings: Settings,
    every: dict[str, Traits],
    mixed: dict[str, tuple[str, ...]],
    wrap: Callable[[DraftPolicy], DraftPolicy] | None,
) -> ArmPolicies:
    def new(drafters: frozenset[str]) -> DraftPolicy:
        traits = {kind: one for kind, one in every.items() if kind in drafters}
        several = {name: members for name, members in mixed.items() if drafters.issuperset(members)}
        return build_policy(
            settings.policy, traits, settings.seed, settings.drafter.max_draft, several
        )

    ordinary = new(frozenset(every) - set(on_request(settings.drafter)))
    return ArmPolicies(ordinary if wrap is None else wrap(ordinary), new)


def _profile(settings: Settings, parts: EngineParts) -> list[CostSample]:
    context = min(_PROFILE_CONTEXT, model_len(settings) // 2)
    on_gpu = parts.programs.graphs.are_real
    return profile_steps(parts, _PROFILE_REPEATS if on_gpu else _CPU_PROFILE_REPEATS, context)


def _make_parts(
    settings: Settings,
    loaded: LoadedTarget,
    kinds: tuple[str, ...],
    learning: Learning,
    *,
    is_shared: bool,
) -> tuple[EngineParts, dict[str, FlatWeights]]:
    e = settings.engine
    with timed("laid out the target"):
        taps = [layer for k in kinds for layer in kind_of(k).layer_ids(_weights_of(k, learning))]
        target = Target(loaded.model, tuple(dict.fromkeys(taps)))
    num_pages = _num_pages(settings, target)
    # On a GPU the driver pins the ring's memory, half a second in which nothing waits for it.
    make_ring = partial(_ring, settings, target, is_shared)
    making = Ahead("made the capture ring", make_ring) if kinds else None
    with timed("made the drafters"):
        hosts, texts, neural = _make_drafters(settings, target, num_pages, kinds, learning)
        # Before any capture: this moves the parameters, whose addresses stay fixed from then on.
        flat = flat_weights(neural)
    sizes = Sizes(
        e.max_batch, model_len(settings), e.prefill_chunk, e.page_size, num_pages,
        settings.drafter.max_draft,
    )  # fmt: skip
    on_gpu, pinned = target.device.type == "cuda", e.numerics == "pinned"
    if pinned and not on_gpu:
        raise ValueError(
            f"engine.numerics is 'pinned', which needs a GPU; device is {target.device.type}; set "
            f"it to 'fast'"
        )
    cuts = cuts_of(settings.policy)
    choices = Choices(
        rule=Rule.BLOCK if e.verification == "block" else Rule.STANDARD,
        prefix_cache=e.prefix_cache,
        prefill_hold_s=e.prefill_hold_ms / 1e3 if on_gpu else 0.0,
        max_queue=e.max_queue,
        overlaps=on_gpu,
        on_request=on_request(settings.drafter),
        cuts=cuts,
        mixes=mixes(settings.drafter, on_gpu=on_gpu, are_cut=bool(cuts)),
    )
    eos_ids = _eos_ids(loaded.model)
    sequences = Sequences(loaded.tokenizer, eos_ids, settings.seed, _captures(settings.capture))
    with timed("fused weights"):
        is_own = fuse(target, neural, sizes.pages_each * e.page_size, pinned=pinned)
        choices = replace(choices, is_own=is_own)
    with timed("waited for the capture ring"):
        ring = making.result() if making else None
    with timed("made pages and lanes"):
        parts = assemble(target, hosts, neural, sizes, sequences, choices, ring, texts)
    with torch.inference_mode(), timed("made all programs", "making all programs"):
        parts.programs.capture_all(e.draft_at_start, settings.run_dir / KERNELS_FILE)
    return parts, flat


def _make_drafters(
    settings: Settings,
    target: Target,
    num_pages: int,
    kinds: tuple[str, ...],
    learning: Learning,
) -> tuple[list[HostDrafter], list[TextDrafter], list[NeuralDrafter]]:
    hosts: list[HostDrafter] = []
    texts: list[TextDrafter] = []
    neural: list[NeuralDrafter] = []
    on_gpu = target.device.type == "cuda"
    for kind in kinds:
        context = DrafterContext(
            settings=settings_of(settings, kind).drafter,
            embed=target.embed,
            lm_head=target.lm_head,
            hidden_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            num_slots=num_pages * settings.engine.page_size,
            logits=partial(target.logits, widen=False),
            device=target.device,
            dtype=target.dtype,
            weights=_weights_of(kind, learning),
        )
        form = placed(kind, settings.drafter, on_gpu=on_gpu)
        made: Any = form.build(context)
        if form is kind_of(kind).on_device:
            texts.append(made)
        else:
            (neural if form.traits.on_device else hosts).append(made)
    return hosts, texts, neural


def _weights_of(kind: str, learning: Learning) -> Weights | None:
    first = learning.get(base_of(kind))
    return None if first is None else first.weights


def _service(
    settings: Settings,
    backend: Backend,
    model: ServedModel,
    parts: EngineParts,
    policies: ArmPolicies,
    learning: Learning,
    flat: dict[str, FlatWeights],
    loaded: LoadedTarget,
    redaction: Redaction | None,
    apart: Spawned | None,
) -> Service:
    # Containers that share a folder may share names and process ids, too.
    producer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    programs = parts.programs
    recorder: Recorder | RecorderProcess | None = None
    maker = None
    if (ring := programs.ring) is not None:
        audit(settings.run_dir, "write", settings.buffer.url, backend.run)
        if apart is not None and ring.shared is not None:
            with timed("let the recorder's process open the buffer"):
                layer_ids = programs.target.layer_ids
                recorder = RecorderProcess(settings, ring.shared, layer_ids, apart)
        else:
            recorder = open_recorder(settings, backend)
            if apart is not None:
                apart.end()
        maker = TraceMaker(
            Producer(producer, int(time.time() * 1000), loaded.fingerprint),
            ring,
            programs.target.layer_ids,
        )
    followers = swappers(settings, learning, flat, parts, policies, producer, loaded.fingerprint)
    savings = None
    if isinstance(policies.ordinary, TimesPlainSteps):
        savings = Savings(policies.ordinary.plain_s)
    several = list(followers.values())
    target = TargetUpdates(
        weights=TargetWeights(programs.target),
        in_force=InForce(0, loaded.fingerprint, loaded.folder),
        run_dir=settings.run_dir,
        tell=_target_changed(maker, several),
        wake_engine=parts.inbox.wake,
    )
    device = hardware_of(programs.target.device)
    load = open_load(settings.run_dir, device) if followers else None
    listeners = _listeners(recorder, maker, several, redaction, savings, target)
    if load is not None:
        listeners = replace(listeners, on_pass=load.passed)
    engine = Engine(parts, policies.ordinary, listeners, policies.of)
    return Service(model, engine, recorder, maker, followers, policies, savings, target, load=load)


def _target_changed(maker: TraceMaker | None, followers: list[Swapper]) -> Callable[[str], None]:
    """Whom a new fingerprint of the target concerns."""
    concerned = [one.target_changed for one in (maker, *followers) if one is not None]

    def tell(fingerprint: str) -> None:
        for target_changed in concerned:
            target_changed(fingerprint)

    return tell


def _captures(settings: CaptureSettings) -> Callable[[str], bool]:
    """Whether the traffic of a tenant may be captured."""
    allowed = None if settings.tenants is None else frozenset(settings.tenants)
    excluded = frozenset(settings.excluded_tenants)
    return lambda tenant: tenant not in excluded and (allowed is None or tenant in allowed)


def _listeners(
    recorder: Recorder | RecorderProcess | None,
    maker: TraceMaker | None,
    followers: list[Swapper],
    redaction: Redaction | None,
    savings: Savings | None,
    target: TargetUpdates,
) -> Listeners:
    heard: dict[str, Any] = {"change_target": target.between_steps}
    if isinstance(recorder, RecorderProcess) and maker is not None:
        send, noted = recorder.put, maker.noted
        heard["on_finished"] = lambda sequence: send(noted(sequence))
    elif isinstance(recorder, Recorder) and maker is not None:
        put, finished = recorder.put, maker.finished
        if redaction is None:
            heard["on_finished"] = lambda sequence: put(finished(sequence))
        else:
            heard["on_finished"] = lambda sequence: put(redaction.of(finished(sequence)))
    if len(followers) == 1:
        heard |= {"before_step": followers[0].between_steps, "on_rounds": followers[0].on_rounds}
    elif followers:
        heard |= all_of(followers)
    if savings is not None:
        heard["on_outcome"] = savings.observe
    return Listeners(**heard)


def _ring(settings: Settings, target: Target, is_shared: bool) -> CaptureRing | None:
    if not settings.capture.enabled:
        return None
    num_layers, hidden_size = len(target.layer_ids), target.config.hidden_size
    rows = ring_rows(settings, (num_layers + 1) * hidden_size, memory_bytes())
    make = partial(
        CaptureRing, rows, num_layers, hidden_size, target.device, settings.capture.dtype
    )
    if not is_shared:
        return make()
    try:
        return make(is_shared=True)
    except OSError as error:
        if settings.capture.process:
            raise ValueError(f"capture.process is true, but {error}") from error
        log.warning("traces are written by the engine's process: %s", error)
        return make()


def ring_rows(settings: Settings, row_values: int, memory_bytes: int) -> int:
    """Rows of the capture ring: at least what two steps may append.

    Args:
        row_values: hidden values of one row, (m + 1) * H.
        memory_bytes: memory of this host.
    """
    e, capture = settings.engine, settings.capture
    rows = capture.ring_rows
    if rows is None:
        row_bytes = row_values * (1 if capture.dtype == "float8_e4m3fn" else 2)
        affordable = int(_RING_SHARE * memory_bytes) // row_bytes
        rows = min(e.max_batch * min(model_len(settings), _RING_TOKENS), affordable)
    chunks = e.prefill_chunk + BLOCK * e.max_batch
    rounds = ROUNDS_ON_THE_WAY * e.max_batch * (settings.drafter.max_draft + 1)
    return max(rows, 2 * (chunks + rounds))


def _num_pages(settings: Settings, target: Target) -> int:
    e = settings.engine
    longest = model_len(settings) + settings.drafter.max_draft + 1
    wanted = e.max_batch * -(-longest // e.page_size) + 1
    if e.num_pages is not None:
        return e.num_pages
    if target.device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(target.device)
    pool = target.make_pool(1)
    slot_bytes = sum(k.nbytes + v.nbytes for k, v in zip(pool.keys, pool.values, strict=True))
    free -= table_bytes_of(e.max_batch + 1, target.vocab_size)
    affordable = int(free * e.kv_memory_fraction) // (slot_bytes * e.page_size)
    return max(min(wanted, affordable), 2)


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-text ids of the generation config, or of the model config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    ids = eos if isinstance(eos, list) else [eos]
    return known_eos_ids(ids, model.config.get_text_config().vocab_size)
