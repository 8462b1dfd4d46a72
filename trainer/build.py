"""From settings to a trainer that is ready to run, fresh or resumed."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.interface import Backend
from buffer.traces import TraceReader
from configs.schema import Settings
from targets.head import load_target_head
from trainer.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from trainer.dataset import Expected, Refusal, Sample, key_of, sample_of
from trainer.gate import Judge
from trainer.journal import Journal
from trainer.learner import Learner
from trainer.loop import TRACES_AT_ONCE, Trainer
from trainer.replay import Memory, keys_in, new_memory, restore
from trainer.start import newest_drafter


def build_trainer(settings: Settings, stop: threading.Event) -> Trainer:
    """Load what is needed, and go on from the last checkpoint if there is one.

    Raises:
        ValueError: target, bundle or checkpoint cannot be used; the text says why.
    """
    _set_up_process(settings)
    device = pick_device(settings.trainer.device)
    folder = target_folder(settings.target)
    fingerprint = target_fingerprint(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = load_target_head(folder, device, dtype)
    backend = open_backend(settings.buffer.url, settings.run_dir)
    store = backend.open_weights()
    manifest, model = newest_drafter(settings, store, head, fingerprint)
    incumbent = copy.deepcopy(model)
    vocab_size, hidden_size = head.lm_head.weight_VH.shape
    expected = Expected(fingerprint, model.config.layer_ids, hidden_size, vocab_size)
    trainer = Trainer(
        settings=settings,
        expected=expected,
        reader=TraceReader(backend),
        store=store,
        memory=new_memory(settings.trainer, settings.seed),
        learner=Learner(model, head, settings.trainer, device),
        judge=Judge(head, device, incumbent.to(device), settings.trainer.gate_margin),
        published=manifest,
        random=np.random.default_rng(settings.seed),
        journal=Journal(settings.run_dir / "trainer"),
        stop=stop,
    )
    saved = read_checkpoint(trainer.checkpoints)
    if saved is None:
        trainer.journal.event("started", version=manifest.version)
        trainer.checkpoint()  # from here on there is always one to go back to
    else:
        resume(trainer, saved, backend)
    return trainer


def resume(trainer: Trainer, saved: Checkpoint, backend: Backend) -> None:
    """Put a trainer where the checkpoint was made.

    Traces read after it are read again; those it held are read from the log by their names, and
    are missed if they left it meanwhile.

    Raises:
        CheckpointError: it was made for another target or drafter, or is incomplete.
    """
    state = saved.state
    try:
        for name, ours in trainer.identity().items():
            if state[name] != ours:
                raise ValueError(f"its {name} is {state[name]}, this run has {ours}")
        trainer.learner.load_state_tensors(saved.tensors)
        trainer.learner.step = state["step"]
        trainer.learner.num_skipped = state["num_skipped"]
        trainer.learner.lr_scale = state["lr_scale"]
        trainer.steps_since_judged = state["steps_since_judged"]
        trainer.refused_in_row = state["refused_in_row"]
        trainer.random.bit_generator.state = state["random"]
        trainer.reader = TraceReader(backend, state["offsets"])
        trainer.memory = _remember(trainer, backend, state["memory"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(trainer.checkpoints, f"{type(error).__name__}: {error}") from error
    wanted = keys_in(state["memory"])
    found = {
        x.key
        for x in (
            *trainer.memory.samples(),
            *trainer.memory.held_out,
            *trainer.memory.held_out_older,
        )
    }
    trainer.journal.event(
        "resumed",
        step=trainer.learner.step,
        version=trainer.published.version,
        traces=len(found),
        traces_gone=len(wanted - found),
    )


def _remember(trainer: Trainer, backend: Backend, stored: dict[str, Any]) -> Memory:
    """Memory of a checkpoint, its samples read again from the oldest record of the log."""
    settings = trainer.settings
    wanted, found = keys_in(stored), dict[str, Sample]()
    reader = TraceReader(backend)
    while wanted - found.keys():
        seen = _num_seen(reader)
        for trace in reader.read(TRACES_AT_ONCE):
            if key_of(trace) in wanted:
                sample = sample_of(trace, trainer.expected, settings.trainer.max_sequence)
                if not isinstance(sample, Refusal):
                    found[sample.key] = sample
        if _num_seen(reader) == seen:
            break  # the end of the log
    return restore(settings.trainer, settings.seed, stored, found)


def _num_seen(reader: TraceReader) -> int:
    return reader.counts.read + reader.counts.duplicate + reader.counts.quarantined


def _set_up_process(settings: Settings) -> None:
    """Yield the cores to a server beside us. Denormals would make products slow."""
    os.nice(settings.trainer.nice)
    if settings.trainer.cpu_threads is not None:
        torch.set_num_threads(settings.trainer.cpu_threads)
    torch.set_flush_denormal(True)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one.

    Raises:
        ValueError: CUDA is asked for and missing.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if name.startswith("cuda") and not has_cuda:
        raise ValueError(
            f"trainer.device is {name!r}, but no CUDA device is there; use cpu or auto"
        )
    return torch.device(name)


def target_folder(target: str) -> Path:
    """Folder of a target: the path itself, or the snapshot of a Hugging Face id.

    Raises:
        ValueError: it is neither.
    """
    path = Path(target)
    if path.is_dir():
        return path
    if path.is_absolute() or target.startswith("."):
        raise ValueError(f"target {target!r} is not a folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(target, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target {target!r} is neither a folder here nor a Hugging Face id that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error
