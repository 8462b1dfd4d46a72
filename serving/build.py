"""From settings to a running service."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from buffer.fingerprint import target_fingerprint
from buffer.records import Manifest
from buffer.traces import open_trace_writer
from configs.schema import Settings
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.eagle3.paged import PagedEagle3
from drafters.initial import TargetFacts, first_drafter
from drafters.suffix import SuffixIndex
from policies.build import build_policy
from policies.cost import CostSample
from policies.goodput import GoodputPolicy
from policies.rollback import SwapWatch
from serving.capture.recorder import Recorder
from serving.capture.ring import ROUNDS_ON_THE_WAY, CaptureRing
from serving.capture.traces import Producer, TraceMaker
from serving.engine.adjusting import adjusting_bytes
from serving.engine.blocks import BLOCK
from serving.engine.drafting import Drafting
from serving.engine.loop import Engine
from serving.engine.pages import PagePool
from serving.engine.programs import Programs, make_programs
from serving.engine.scheduler import Scheduler
from serving.profile import profile_engine
from serving.service import Service
from serving.swap.flat_weights import Expected, FlatWeights
from serving.swap.swapper import Swapper
from targets.load import load_model, load_tokenizer, pick_device, pick_dtype, target_folder
from targets.target import KvPool, Target, by_columns

log = logging.getLogger(__name__)

_PROFILE_REPEATS = 5
_PROFILE_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A target in memory, on the device that decodes."""

    model: Any
    """A Hugging Face causal LM in the dtype that it is served in; becomes the engine's own."""
    tokenizer: Any
    fingerprint: str
    """64 hex digits that tie drafters and traces to it."""
    name: str
    """What it is called unless ``server.model_name`` says otherwise."""


def load_target(settings: Settings) -> LoadedTarget:
    """The target that the settings name.

    Raises:
        ValueError: it cannot be used; the text says why.
    """
    device = pick_device(settings.device)
    folder = target_folder(settings.target)
    fingerprint = target_fingerprint(folder)
    model = load_model(folder, pick_dtype(settings.dtype, device), device)
    return LoadedTarget(model, load_tokenizer(folder), fingerprint, folder.name)


def build_engine(settings: Settings, loaded: LoadedTarget | None = None) -> Service:
    """Load everything, measure step times, and return a service that is ready to start.

    Args:
        loaded: serve this target; ``None``: load the one that the settings name.

    Raises:
        ValueError: the target or the drafter cannot be used; the text says why.
    """
    if settings.engine.cpu_threads is not None:
        torch.set_num_threads(settings.engine.cpu_threads)
    torch.set_flush_denormal(True)
    if loaded is None:
        with _timed("loaded the target"):
            loaded = load_target(settings)
    model, fingerprint = loaded.model, loaded.fingerprint
    with _timed("read and checked the drafter"):
        start = _first_drafter(settings, model, fingerprint)
    layer_ids = start[0].layer_ids if start else ()
    with _timed("laid out the target"):
        target = Target(model, layer_ids)
    num_pages = _num_pages(settings, target)
    num_slots = num_pages * settings.engine.page_size
    with _timed("made the drafter"):
        neural = _neural(start, target, num_slots) if start else None
        # Before anything is captured: this moves the parameters, and from then on they stay.
        weights = FlatWeights(neural.module) if neural else None
    suffix = _suffix(settings)
    kinds = (("eagle3",) if neural else ()) + (("suffix",) if suffix else ())
    policy = build_policy(settings.policy, kinds, settings.seed, settings.drafter.max_draft)
    with _timed("made the pages"):
        pool = target.make_pool(num_slots)
        drafting = Drafting(
            target, neural, suffix, num_pages, settings.engine.page_size, settings.drafter.max_draft
        )
    with _timed("made the capture ring"):
        ring = _ring(settings, target) if neural else None
    programs = _programs(settings, target, pool, drafting, ring)
    engine = Engine(
        target=target,
        pool=pool,
        scheduler=Scheduler(
            PagePool(num_pages, settings.engine.prefix_cache),
            settings.engine.page_size,
            settings.engine.max_batch,
            settings.engine.prefill_chunk,
            settings.drafter.max_draft,
            settings.engine.prefill_hold_ms / 1e3 if programs else 0.0,
        ),
        tokenizer=loaded.tokenizer,
        eos_ids=_eos_ids(model),
        policy=policy,
        drafting=drafting,
        programs=programs,
        ring=ring,
        max_model_len=settings.engine.max_model_len,
        max_queue=settings.engine.max_queue,
        model_name=settings.server.model_name or loaded.name,
        seed=settings.seed,
        rule=settings.engine.verification,
    )
    if isinstance(policy, GoodputPolicy):
        policy.calibrate(_profile(settings, engine))
    if start is not None:
        policy.on_swap(start[1].version, start[1].policy)
    return _service(settings, engine, weights, start[1] if start else None, fingerprint)


def _programs(
    settings: Settings,
    target: Target,
    pool: KvPool,
    drafting: Drafting,
    ring: CaptureRing | None,
) -> Programs | None:
    e = settings.engine
    on_gpu, pinned = target.device.type == "cuda", e.numerics == "pinned"
    if pinned and (e.programs == "never" or not on_gpu):
        raise ValueError(
            f"engine.numerics is 'pinned', which needs a GPU and its programs; device is "
            f"{target.device.type} and engine.programs {e.programs}; set it to 'fast'"
        )
    if e.programs == "never" or (e.programs == "auto" and not on_gpu):
        return None
    with _timed("fused weights and made the lanes"):
        programs = make_programs(
            target,
            pool,
            drafting,
            max_batch=e.max_batch,
            max_model_len=e.max_model_len,
            prefill_chunk=e.prefill_chunk,
            page_size=e.page_size,
            rule=e.verification,
            ring=ring,
            fuse=on_gpu,
            pinned=pinned,
        )
    with torch.inference_mode(), _timed("made all programs"):
        programs.capture_all()
    return programs


def _profile(settings: Settings, engine: Engine) -> list[CostSample]:
    context = min(_PROFILE_CONTEXT, settings.engine.max_model_len // 2)
    with _timed("profiled step times"):
        return profile_engine(engine, settings.drafter.max_draft, _PROFILE_REPEATS, context)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Say what a part of the start took: what the device still does of it counts in the next."""
    started = time.perf_counter()
    yield
    log.info("%s in %.1f s", what, time.perf_counter() - started)


def _service(
    settings: Settings,
    engine: Engine,
    weights: FlatWeights | None,
    initial: Manifest | None,
    fingerprint: str,
) -> Service:
    producer = f"{socket.gethostname()}-{os.getpid()}"
    recorder = swapper = None
    if engine.ring is not None:
        b = settings.buffer
        writer = open_trace_writer(
            b.url,
            settings.run_dir,
            segment_bytes=b.segment_bytes,
            max_bytes=b.max_bytes,
            ttl_s=b.ttl_s,
            sync_interval_s=b.sync_interval_s,
        )
        recorder = Recorder(writer, settings.capture.queue_traces, b.sync_interval_s)
        maker = TraceMaker(
            Producer(producer, int(time.time() * 1000), fingerprint),
            engine.ring,
            engine.target.layer_ids,
            engine.count_lost_rows,
        )
        put = recorder.put
        engine.on_finished = lambda sequence: put(maker.finished(sequence))
    if engine.drafting.neural is not None and weights is not None and initial is not None:
        swapper = Swapper(
            neural=engine.drafting.neural,
            weights=weights,
            initial=initial,
            expected=Expected(initial.kind, initial.drafter_config, fingerprint),
            root=settings.run_dir / "weights",
            producer=producer,
            policy=engine.policy,
            poll_s=settings.swap.poll_s,
            watch=SwapWatch(settings.swap.watch_rounds, settings.swap.max_drop),
            automatic=settings.swap.enabled,
            wake_engine=engine.wake,
        )
        engine.between_steps = swapper.between_steps
        engine.on_rounds = swapper.on_rounds
    return Service(engine, recorder, swapper)


def _first_drafter(
    settings: Settings, model: Any, fingerprint: str
) -> tuple[Eagle3Config, Manifest, dict[str, torch.Tensor]] | None:
    """Config, manifest and tensors to start with, see ``first_drafter``."""
    if settings.drafter.kind != "eagle3":
        return None
    stored = first_drafter(
        settings.run_dir / "weights",
        settings.drafter.kind,
        TargetFacts(model.config, model.get_output_embeddings().weight, fingerprint),
        path=settings.drafter.path,
        layer_ids=settings.drafter.layer_ids,
        seed=settings.seed,
    )
    config = Eagle3Config.from_json(stored.manifest.drafter_config)
    return config, stored.manifest, stored.tensors


def _neural(
    start: tuple[Eagle3Config, Manifest, dict[str, torch.Tensor]], target: Target, num_slots: int
) -> PagedEagle3:
    config, manifest, tensors = start
    with torch.device("meta"):  # weights that are drawn only to be replaced take seconds
        module = Eagle3(config).requires_grad_(False).eval()
    module.load_state_dict(tensors, assign=True)
    module.to(device=target.device, dtype=target.dtype)
    by_columns(module)
    neural = PagedEagle3(module, target.embed, num_slots)
    neural.version = manifest.version
    return neural


def _suffix(settings: Settings) -> SuffixIndex | None:
    s = settings.drafter.suffix
    wanted = settings.drafter.kind == "suffix" or (settings.drafter.kind != "none" and s.enabled)
    return SuffixIndex(s.min_match, s.max_match, s.recent_tokens) if wanted else None


def _ring(settings: Settings, target: Target) -> CaptureRing | None:
    if not settings.capture.enabled:
        return None
    e = settings.engine
    chunks = e.prefill_chunk + BLOCK * e.max_batch
    rounds = ROUNDS_ON_THE_WAY * e.max_batch * (settings.drafter.max_draft + 1)
    rows = max(settings.capture.ring_rows, 2 * (chunks + rounds))
    shape = rows, len(target.layer_ids), target.config.hidden_size
    return CaptureRing(*shape, target.device, settings.capture.dtype)


def _num_pages(settings: Settings, target: Target) -> int:
    e = settings.engine
    longest = e.max_model_len + settings.drafter.max_draft + 1
    wanted = e.max_batch * -(-longest // e.page_size) + 1
    if e.num_pages is not None:
        return e.num_pages
    if target.device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(target.device)
    pool = target.make_pool(1)
    slot_bytes = sum(k.nbytes + v.nbytes for k, v in zip(pool.keys, pool.values, strict=True))
    if e.programs != "never":
        free -= adjusting_bytes(e.max_batch + 1, target.vocab_size)
    affordable = int(free * e.kv_memory_fraction) // (slot_bytes * e.page_size)
    return max(min(wanted, affordable), 2)


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-text ids of the generation config, or of the model config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
