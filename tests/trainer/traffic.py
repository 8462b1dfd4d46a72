"""A small real target, traffic that it would have served, and trainers for it.

Traces are made with plain transformers: continue token by token, then read the hidden states of one
pass over the whole text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.fingerprint import target_fingerprint
from buffer.interface import TraceLimits
from buffer.records import FeatureRows, Round, Rounds, Sampling, Trace
from configs.schema import DrafterSettings, Settings, TrainerSettings
from drafters.eagle3.model import default_layer_ids
from drafters.initial import TargetFacts
from trainer.build import build_trainer
from trainer.loop import run

HIDDEN, VOCAB, LAYERS = 32, 96, 4
LAYER_IDS = default_layer_ids(LAYERS)
PROMPT, LENGTH = 6, 36
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_target(folder: Path, seed: int = 0, tie: bool = True) -> Any:
    """A random target whose top tokens differ from context to context."""
    torch.manual_seed(seed)
    if tie:
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def make_traces(
    model: Any,
    fingerprint: str,
    count: int,
    *,
    first_seq: int = 0,
    temperature: float = 0.0,
    layer_ids: tuple[int, ...] = LAYER_IDS,
) -> list[Trace]:
    """``count`` requests of 6 prompt tokens and 30 generated ones; prompts from a small set."""
    generator = torch.Generator().manual_seed(first_seq)
    prompts = torch.randint(0, VOCAB, (12, PROMPT), generator=torch.Generator().manual_seed(99))
    ids = prompts[torch.randint(0, len(prompts), (count,), generator=generator)]
    ids[:, -1] = torch.randint(0, VOCAB, (count,), generator=generator)
    while ids.shape[1] < LENGTH:
        scores = model(ids).logits[:, -1]
        if temperature == 0:
            picked = scores.argmax(-1, keepdim=True)
        else:
            probs = (scores / temperature).softmax(-1)
            picked = torch.multinomial(probs, 1, generator=generator)
        ids = torch.cat((ids, picked), dim=1)
    unnormed = []
    hook = model.model.norm.register_forward_pre_hook(lambda _m, args: unnormed.append(args[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    streams = [*states[:-1], *unnormed]  # Hugging Face's last state is behind the final norm
    rows = torch.stack([*(streams[k] for k in layer_ids), states[-1]], dim=2)[:, :-1]
    return [
        trace_of(ids[i], rows[i], fingerprint, first_seq + i, temperature, layer_ids)
        for i in range(count)
    ]


def trace_of(
    ids: torch.Tensor,
    rows: torch.Tensor,
    fingerprint: str,
    seq: int,
    temperature: float = 0.0,
    layer_ids: tuple[int, ...] = LAYER_IDS,
) -> Trace:
    """A trace with rows [T - 1, m + 1, H] at all positions but the last, as bfloat16."""
    bits = rows.bfloat16().contiguous().view(torch.uint16).numpy()
    positions = np.arange(rows.shape[0], dtype=np.int32)
    return Trace(
        producer="server",
        epoch=1,
        seq=seq,
        request_id=f"r{seq}",
        tenant="default",
        target_fingerprint=fingerprint,
        sampling=Sampling({"temperature": temperature}),
        prompt_length=PROMPT,
        token_ids=ids.numpy().astype(np.int32),
        rounds=Rounds.of([Round(PROMPT, "eagle3", 0, (1,), None, (-0.5,), 0, 2, 1, 1.0, 1, 0.01)]),
        features=FeatureRows(positions, layer_ids, "bfloat16", bits, None),
        finished_unix_ms=1,
    )


def with_rows(trace: Trace, rows: np.ndarray[Any, Any]) -> Trace:
    assert trace.features is not None
    return replace(trace, features=replace(trace.features, rows=rows))


def write_traces(run_dir: Path, traces: Iterable[Trace]) -> None:
    """Put traces into the run's log, as a server that then ended."""
    limits = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 26, ttl_s=1e6, sync_interval_s=0.0)
    with open_backend("log:", run_dir).open_trace_writer(limits) as writer:
        for trace in traces:
            writer.append(encode_trace(trace))


def settings_for(run_dir: Path, target: Path, **trainer: Any) -> Settings:
    """Small batches, frequent publishing."""
    values: dict[str, Any] = {
        "device": "cpu",
        "nice": 0,
        "lr": 3e-3,
        "batch_tokens": 256,
        "max_sequence": 64,
        "ttt_steps": 4,
        "min_traces": 8,
        "publish_every_steps": 10,
        "replay_ratio": 8.0,
        "warmup_steps": 2,
        "held_out_every": 6,
        "checkpoint_every_s": 1000.0,
        "cool_down_s": 0.0,
        **trainer,
    }
    return Settings(
        target=str(target),
        run_dir=run_dir,
        drafter=DrafterSettings(kind="eagle3"),
        trainer=TrainerSettings(**values),
    )


def train(settings: Settings) -> None:
    """Run one trainer from start to end in this process."""
    run(build_trainer(settings, threading.Event()))


def fingerprint_of(target: Path) -> str:
    return target_fingerprint(target)


def facts_of(folder: Path, model: Any) -> TargetFacts:
    """What new drafters are made from, of a target and its folder."""
    head_VH = model.get_output_embeddings().weight.detach()
    return TargetFacts(model.config, head_VH, fingerprint_of(folder))
