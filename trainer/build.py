"""Build a trainer from settings, and resume it from its last checkpoint."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from buffer.audit import audit
from buffer.backends import limits_of, open_backend
from buffer.bundles import BundleError
from buffer.interface import Backend, Location
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.run_target import former_of
from buffer.seen import SeenTraces
from buffer.signed_weights import open_weights
from buffer.traces import TraceReader
from buffer.weights_store import WeightsStore
from configs.schema import Settings
from drafters.objectives import objective_of
from drafters.several import learning, line_of, settings_of
from drafters.trainable import Trainable, trainable
from policies.draws.catalog import entry
from policies.payback import Payback
from reporting.catalog import asked_for
from reporting.reports import Reports
from targets.head import TargetHead, load_target_head
from trainer.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from trainer.dataset import ROW_TYPES, Emphasis, Expected, name_of, triple_of
from trainer.duty import Duty, duty_of
from trainer.fits import Fits, plan_of
from trainer.gate import Judge, Static
from trainer.group import Group, device_of, single
from trainer.intake import Intake
from trainer.journal import Journal
from trainer.learner import Learner
from trainer.loop import Trainer
from trainer.pace import Pace
from trainer.publish import Candidate, Publisher
from trainer.recent import RecentTraces
from trainer.replay import Memory, keys_in
from trainer.reporting import Reporter
from trainer.rows import RowStore, memory_bytes
from trainer.run_target import Place, target_of_run
from trainer.saver import Saver
from trainer.start import newest_drafter
from trainer.target import TargetWatch
from trainer.team import share_target
from trainer.update import batch_dtype, is_divided
from trainer.worth import Worth

log = logging.getLogger(__name__)

_SWITCH_S = 0.001
"""After which the thread that launches updates gets the interpreter's lock back from the one that
reads traces. It gives it up in each of torch's operations, and would wait 5 ms by default."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the trainers of a run share."""

    stop: threading.Event
    reports: Reports
    group: Group
    device: torch.device
    head: TargetHead
    fingerprint: str
    backend: Backend
    num_trainers: int
    duty: Duty


def build_trainers(
    settings: Settings,
    stop: threading.Event,
    reports: Reports | None = None,
    group: Group | None = None,
    place: Place | None = None,
) -> list[Trainer]:
    """A trainer for each drafter of the run that learns, the main one first, ready to run and
    resumed from its last checkpoint if there is one.

    Args:
        reports: where they report; ``None``: nowhere.
        group: its processes, if there are several; this is the first of them.
        place: of the target's weights; ``None``: they are looked for.

    Raises:
        ValueError: the target, a bundle or a checkpoint cannot be used, or the drafter does not
            learn; or DeepSpeed is to divide several drafters.
        GroupError: another process is gone.
    """
    group = group or single()
    trainable(settings.drafter.kind)
    kinds = learning(settings)
    if len(kinds) > 1 and is_divided(settings.trainer, group):
        raise ValueError(
            f"trainer.deepspeed.stage is {settings.trainer.deepspeed.stage}, but DeepSpeed divides "
            f"one drafter, and {len(kinds)} are to learn ({', '.join(kinds)}); set it to 0, or "
            f"leave drafter.beside out"
        )
    set_up_process(settings)
    objective_of(settings.trainer)  # unknown names are refused before anything is loaded
    entry(settings.trainer.draw)
    device = device_of(settings.trainer.device, group)
    place = place or target_of_run(settings)
    share_target(group, place.fingerprint)
    head = load_target_head(place.folder, device, batch_dtype(device))
    backend = open_backend(settings.buffer.url, settings.run_dir)
    duty = duty_of(settings.trainer, settings.run_dir, stop, device)
    shared = _Shared(
        stop,
        reports or Reports(),
        group,
        device,
        head,
        place.fingerprint,
        backend,
        len(kinds),
        duty,
    )
    return [_trainer(_of_line(settings, kind), line_of(settings, kind), shared) for kind in kinds]


def build_trainer(
    settings: Settings,
    stop: threading.Event,
    reports: Reports | None = None,
    group: Group | None = None,
) -> Trainer:
    """The trainer of a run in which one drafter learns; see ``build_trainers``."""
    (trainer,) = build_trainers(settings, stop, reports, group)
    return trainer


def _of_line(settings: Settings, kind: str) -> Settings:
    """The settings of one drafter's trainer. It gets all traces, whatever those of others got."""
    line, own = line_of(settings, kind), settings_of(settings, kind)
    if not line:
        return own
    group = own.trainer.model_copy(update={"group": f"{own.trainer.group}-{line}"})
    return own.model_copy(update={"trainer": group})


def _trainer(settings: Settings, line: str, shared: _Shared) -> Trainer:
    """
    Args:
        settings: of one drafter's trainer.
        line: name of its version line and folder.
    """
    learns = trainable(settings.drafter.kind)
    draws = entry(settings.trainer.draw)
    rewards = _rewards(settings, learns)
    device, head, backend = shared.device, shared.head, shared.backend
    audit(
        settings.run_dir,
        "read",
        settings.buffer.url,
        backend.run,
        group=settings.trainer.group,
    )
    store = _weights(settings, backend, line)
    manifest, model = newest_drafter(settings, store, head, shared.fingerprint)
    incumbent = copy.deepcopy(model).to(device)
    root = settings.run_dir / "trainer" / line
    journal = _journal(settings, root, line, shared)
    share = memory_bytes(settings.trainer, device) // shared.num_trainers
    rows = RowStore(device, share, has_outcomes=rewards)
    fits = _fits(settings, line)
    trainer = Trainer(
        settings=settings,
        intake=Intake(
            TraceReader(backend, group=settings.trainer.group, limits=limits_of(settings.buffer)),
            replace(
                expected_of(manifest, head),
                emphasis=emphasis_of(settings),
                surprised=settings.drafter.kind if draws.needs_surprise else None,
                counted=settings.drafter.kind,
                rewarded=settings.drafter.kind if rewards else None,
                is_alone=shared.num_trainers == 1,
            ),
            settings.trainer.max_sequence,
            journal,
            TargetWatch(settings.run_dir),
            fits.recent if fits.is_on else None,
        ),
        publisher=Publisher(
            store,
            store.take_over(),
            candidate=Candidate(beside=device.type == "cuda"),
            fits=fits,
        ),
        memory=Memory(settings.trainer, settings.seed, rows),
        learner=Learner(learns, model, head, settings.trainer, rows, group=shared.group),
        judge=Judge(
            learns,
            head,
            rows,
            incumbent,
            settings.trainer.gate_margin,
            settings.trainer.gate_confidence,
            _static(settings, learns, store, device),
            settings.engine.verification == "block",
        ),
        published=manifest,
        random=np.random.default_rng(settings.seed),
        journal=journal,
        stop=shared.stop,
        pace=Pace(settings.trainer, duty=shared.duty),
        saver=Saver(root / "checkpoints", settings.trainer.keep_checkpoints),
        worth=Worth(
            settings.trainer,
            journal.event,
            Payback(settings.trainer.payback_s),
            allowance=shared.duty.allowance,
            drafter=settings.drafter.kind,
        ),
    )
    trainer.judge.between = trainer.breathe
    trainer.worth.begin(manifest)
    saved = read_checkpoint(trainer.saver.root)
    if saved is None:
        trainer.journal.event("started", version=manifest.version)
        trainer.checkpoint()  # so that broken weights can always be restored
        trainer.report_checkpoint(wait=True)
    else:
        if shared.duty.allowance is not None:
            shared.duty.allowance.empty()
        resume(trainer, saved, backend)
    _capture_updates(trainer)
    return trainer


def _fits(settings: Settings, line: str) -> Fits:
    """The draft policy that is fitted beside a drafter, if one is."""
    plan = plan_of(settings, line)
    return Fits() if plan is None else Fits(plan, RecentTraces(plan.settings.most_steps))


def _rewards(settings: Settings, learns: Trainable[Any]) -> bool:
    """Whether draft tokens are rewarded.

    Raises:
        ValueError: they are to be, but this kind of drafter does not learn from that.
    """
    is_asked = settings.trainer.reward_weight > 0
    if is_asked and not getattr(learns, "takes_reward", False):
        raise ValueError(
            f"trainer.reward_weight is {settings.trainer.reward_weight:g}, but the loss of "
            f"{learns.kind} has no such term; set it to 0"
        )
    return is_asked


def _journal(settings: Settings, root: Path, line: str, shared: _Shared) -> Journal:
    kind = settings.drafter.kind if shared.num_trainers > 1 else ""
    if not shared.reports.is_on:
        return Journal(root, drafter=kind)
    reporter = Reporter(
        shared.reports, settings.run_dir / "weights" / line, settings.reports.every_s, line
    )
    return Journal(root, reporter.hear, kind)


def _static(
    settings: Settings, learns: Trainable[Any], store: WeightsStore, device: torch.device
) -> Static | None:
    """Version 0, which never changes, if what learning has gained over it is asked for: that takes
    the memory of one more drafter."""
    if settings.trainer.payback_s is None and not any(asked_for(settings)):
        return None
    try:
        bundle = store.read(0)
    except BundleError as error:
        log.warning("version 0 cannot be read (%s): the gain of learning is unknown", error)
        return None
    model = learns.load_model(bundle.manifest.drafter_config, load(bundle.files[TENSORS]))
    return Static(model.to(device))


def _weights(settings: Settings, backend: Backend, line: str) -> WeightsStore:
    """The versions of a drafter, signed if the settings say so.

    Raises:
        ValueError: a key cannot be used, or servers would refuse what this trainer publishes.
    """
    public, signing = settings.swap.public_key, settings.trainer.signing_key
    if public is not None and signing is None:
        raise ValueError(
            "swap.public_key is set, so servers take signed versions alone, but "
            "trainer.signing_key is not: nobody would take what this trainer publishes"
        )
    return open_weights(backend, public, signing, line)


def _capture_updates(trainer: Trainer) -> None:
    """Capture all updates in CUDA graphs, and run what judges candidates, before traces come. Does
    nothing on a CPU."""
    learner, expected = trainer.learner, trainer.intake.expected
    if learner.fixed_shape is None:
        return
    started_s = time.monotonic()
    dtype = ROW_TYPES[trainer.settings.capture.dtype]
    learner.store.allocate(len(expected.layer_ids) + 1, expected.hidden_size, dtype)
    learner.capture_all()
    log.info("captured all updates in %.1f s", time.monotonic() - started_s)
    started_s = time.monotonic()
    trainer.judge.warm_up(trainer.settings.trainer.max_sequence)
    log.info("warmed the gate up in %.1f s", time.monotonic() - started_s)


def resume(trainer: Trainer, saved: Checkpoint, backend: Backend) -> None:
    """Restore the state of a checkpoint.

    Traces read after the checkpoint are read again. Samples it held are read from the log by their
    keys, and so are those that only newer checkpoints, which are damaged, had learnt from: their
    group has committed them and gives them to nobody any more. What is no longer in the log is left
    out. After a checkpoint that was made for former weights of the target, nothing is held.

    Raises:
        CheckpointError: it was made for another target or drafter, or is incomplete.
    """
    state = saved.state
    intake, group = trainer.intake, trainer.settings.trainer.group
    lr = trainer.settings.trainer.lr
    former = former_of(trainer.settings.run_dir, intake.expected.target_fingerprint)
    try:
        is_former = state["target_fingerprint"] in former
        for name, ours in trainer.identity().items():
            if state[name] != ours and not (is_former and name == "target_fingerprint"):
                raise ValueError(f"its {name} is {state[name]}, this run has {ours}")
        trainer.learner.load_state_tensors(saved.tensors)
        trainer.learner.step = state["step"]
        trainer.learner.num_skipped = state["num_skipped"]
        is_same_rate = state.get("lr", lr) == lr  # checkpoints from before lack it
        trainer.learner.lr_scale = state["lr_scale"] if is_same_rate else 1.0
        trainer.pace.steps_since_judged = state["steps_since_judged"]
        trainer.pace.refused_in_row = state["refused_in_row"]
        # Checkpoints from before lack these two.
        trainer.worth.restore(state.get("worth", {}))
        trainer.publisher.candidate.highest = int(state.get("highest_version", 0))
        trainer.random.bit_generator.state = state["random"]
        seen = SeenTraces.from_json(state["offsets"]["seen"])
        again = _seen_by(saved.damaged, seen)
        wanted = keys_in(state["memory"])
        found = intake.find(wanted | again, TraceReader(backend), _locations_in(state))
        if not is_former:
            trainer.memory.restore(state["memory"], found)
        for key in again & found.keys():
            seen.add(*triple_of(key))
        offsets = {**state["offsets"], "seen": seen.to_json()}
        limits = limits_of(trainer.settings.buffer)
        intake.continue_with(TraceReader(backend, offsets, group, limits))
        trainer.memory.take_in([sample for key, sample in found.items() if key in again])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(trainer.saver.root, f"{type(error).__name__}: {error}") from error
    trainer.journal.event(
        "resumed",
        step=trainer.learner.step,
        version=trainer.published.version,
        traces=len(wanted & found.keys()),
        traces_gone=len(wanted - found.keys()),
        traces_again=len(again & found.keys()),
        traces_again_gone=len(again - found.keys()),
    )
    if not is_same_rate and state["lr_scale"] != 1.0:
        trainer.journal.event(
            "rate_reset",
            text=f"trainer.lr is {lr:g}, where it was {state['lr']:g} and had been scaled by "
            f"{state['lr_scale']:g}: the whole of it is taken",
        )
    if None in saved.damaged:
        trainer.journal.event(
            "not_trained_again",
            text="the state of a damaged checkpoint is damaged, too: which traces its trainer had "
            "committed is unknown, and they are not trained on again",
        )


def _locations_in(state: Mapping[str, Any]) -> dict[str, Location]:
    """Where the samples of a checkpoint are in the buffer; those from before 2026-12 do not say.

    Raises:
        ValueError: what it says is no location.
    """
    stored = state.get("locations", {})
    if not all(isinstance(part, str) for pair in stored.values() for part in pair):
        raise ValueError("a location must be two texts")
    return {key: (writer, location) for key, (writer, location) in stored.items()}


def _seen_by(damaged: Iterable[dict[str, Any] | None], seen: SeenTraces) -> set[str]:
    """Keys of the traces that checkpoints had seen beyond those in ``seen``."""
    newer = [SeenTraces.from_json(state["offsets"]["seen"]) for state in damaged if state]
    return {name_of(*triple) for one in newer for triple in one.beyond(seen)}


def expected_of(manifest: Manifest, head: TargetHead) -> Expected:
    """What traces must fit for the drafter of ``manifest`` to train on them."""
    shape = trainable(manifest.kind).target_shape(manifest.drafter_config)
    vocab_size, hidden_size = head.lm_head.weight_VH.shape
    return Expected(manifest.target_fingerprint, shape.layer_ids, hidden_size, vocab_size)


def emphasis_of(settings: Settings) -> Emphasis | None:
    """Rows that weigh more than others; ``None``: all the same."""
    weight = settings.trainer.rejected_weight
    return None if weight == 1 else Emphasis(settings.drafter.kind, weight)


def set_up_process(settings: Settings) -> None:
    """Yield the cores to a server on this machine, and under CUDA MPS the GPU too. Flush denormals,
    which slow products down. To be called before CUDA is used."""
    os.nice(settings.trainer.nice)
    sys.setswitchinterval(_SWITCH_S)
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")  # below normal, which is 0
    if settings.trainer.gpu_share < 1:
        percentage = f"{100 * settings.trainer.gpu_share:g}"
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", percentage)
    if settings.trainer.cpu_threads is not None:
        torch.set_num_threads(settings.trainer.cpu_threads)
    torch.set_flush_denormal(True)
