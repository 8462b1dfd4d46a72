"""How fast drafters learn by several recipes: what new weights begin as.

    python -m benchmarks.recipes                 # all; three minutes on one core
    python -m benchmarks.recipes --kinds dflash --processes 3

A small random target writes texts at a temperature of 0.7. Each recipe learns from them from new
weights: with one seed, all recipes of a kind see the same batches in the same order, as many
positions. Simulated tokens_per_step (K = 4) is that of the averaged weights, which a trainer would
publish, on texts that were held out.

The target is nearly a table of which token follows which, so this says how soon a drafter finds the
token that it drafts after, not what it brings on text that people read. Writes
``recipes.json`` and ``rows/recipes.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.results import RESULTS, Out, Row, known, say, write_result, write_rows
from configs.schema import TrainerSettings
from drafters.acceptance import simulated_tokens_per_step
from drafters.batch import TrainingBatch, from_sequences
from drafters.trainable import Trainable, trainable
from specops.distill import FrozenHead
from targets.head import TargetHead
from targets.last_layer import load_last_layer
from trainer.optimizers import AdamW

K, HEAT, BATCH = 4, 0.7, 8
"""Draft tokens that are judged, temperature of the texts, texts of an update."""
PROMPT, LENGTH, NUM_TEXTS, NUM_HELD = 8, 96, 512, 24
LAYERS, HIDDEN, VOCAB = 6, 48, 128


def full_residuals(model: Any) -> None:
    """DFlash's layers add ten times as much to the residual stream, as random weights would."""
    for layer in model.layers:
        layer.self_attn.o_proj.weight.mul_(10)
        layer.mlp.down_proj.weight.mul_(10)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to begin and to learn."""

    name: str
    change: Callable[[Any], None] = lambda _model: None
    """Of new weights, in place."""


RECIPES: dict[str, tuple[Recipe, ...]] = {
    "dflash": (Recipe("now"), Recipe("layers add ten times as much", full_residuals)),
    "eagle3": (Recipe("now"),),
}
"""Of each kind; the first is what a run has by default."""
LR = 1e-3
"""As in configs/one_gpu.yaml."""


# The target and its texts


def make_target(folder: Path) -> Any:
    """A random model whose next token depends on the last one, and hardly on the context: what a
    drafter must learn first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1] ** -0.5
        if "norm" in name:
            parameter.fill_(1.0)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(std=0.15)
        elif "o_proj" in name or "down_proj" in name:
            parameter.normal_(std=0.01 * width)
        else:
            parameter.normal_(std=(2.0 if "q_proj" in name or "k_proj" in name else 1.3) * width)
    model.model.norm.weight.fill_(3.5)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def texts_of(model: Any, count: int) -> Tensor:
    """[count, LENGTH] token ids: a random prompt, and what the target samples after it."""
    ids = torch.randint(0, VOCAB, (count, PROMPT))
    cache, step = None, ids
    while ids.shape[1] < LENGTH:
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]
        step = torch.multinomial((logits / HEAT).softmax(-1), 1)
        ids = torch.cat((ids, step), dim=1)
    return ids


@torch.no_grad()
def batch_of(model: Any, ids: Tensor, layer_ids: tuple[int, ...]) -> TrainingBatch:
    """The target's rows of texts [B, LENGTH]."""
    before_norm: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(
        lambda _m, given: before_norm.append(given[0])
    )
    out = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    hook.remove()
    streams = [*out.hidden_states[:LAYERS], before_norm[0]]
    places = torch.arange(LENGTH).expand_as(ids)
    return from_sequences(
        ids, places, torch.cat([streams[k] for k in layer_ids], dim=-1), out.last_hidden_state,
        torch.ones_like(ids, dtype=torch.bool), (places >= PROMPT - 1) & (places < LENGTH - 1),
        torch.full((len(ids),), HEAT),
    )  # fmt: skip


# Learning


def new_model(learns: Trainable[Any], folder: Path, target: Any, seed: int) -> nn.Module:
    """New weights, as a run of this target would have them."""
    head = target.get_output_embeddings().weight
    made: nn.Module = learns.new_model(
        target.config, head, None, seed, None, load_last_layer(folder)
    )
    return made


def run_one(kind: str, name: str, seed: int, updates: int) -> dict[str, Any]:
    """Train by one recipe, judged after a quarter, a half and all updates."""
    torch.set_num_threads(1)
    recipe = next(one for one in RECIPES[kind] if one.name == name)
    learns = trainable(kind)
    with tempfile.TemporaryDirectory() as folder:
        target = make_target(Path(folder))
        model = new_model(learns, Path(folder), target, seed)
    texts = texts_of(target, NUM_TEXTS + NUM_HELD)
    with torch.no_grad():
        recipe.change(model)
    head = TargetHead(
        target.config,
        target.get_input_embeddings().weight,
        FrozenHead(target.get_output_embeddings().weight),
    )
    settings = TrainerSettings(lr=LR)
    ids = learns.target_shape(learns.config_to_json(model)).layer_ids
    held_out = batch_of(target, texts[NUM_TEXTS:], ids)
    average, lr = copy.deepcopy(model).requires_grad_(False), torch.zeros(())
    optimizer = AdamW(model.parameters(), lr, settings.weight_decay)
    generator, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    curve: dict[int, float | None] = {}
    for update in range(updates):
        drawn = torch.randperm(NUM_TEXTS, generator=order)[:BATCH]
        lr.fill_(settings.lr * min(1.0, (update + 1) / settings.warmup_steps))
        loss = learns.loss(model, head, batch_of(target, texts[drawn], ids), settings, generator)
        loss.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step(torch.zeros((), dtype=torch.bool))
        model.zero_grad(set_to_none=True)
        keep = min(settings.average_decay, (1 + update) / (10 + update))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - keep)
        if update + 1 in (updates // 4, updates // 2, updates):
            found = learns.acceptance(average, head, held_out, K)
            at = (update + 1) * BATCH * LENGTH
            curve[at] = simulated_tokens_per_step(found.overlap_RK[found.is_full_R], K)
    return {"kind": kind, "recipe": name, "seed": seed, "tokens_per_step": curve}


# Results


def compared(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each recipe at each number of positions, and what they are above the first
    recipe of the kind with the same seeds."""
    table = []
    for kind, recipes in RECIPES.items():
        by_name = {
            one.name: {r["seed"]: r["tokens_per_step"] for r in runs
                       if (r["kind"], r["recipe"]) == (kind, one.name)}
            for one in recipes
        }  # fmt: skip
        base = by_name[recipes[0].name]
        for name, curves in by_name.items():
            for at in next(iter(curves.values()), {}):
                gains = [curves[seed][at] - base[seed][at] for seed in curves]
                table.append(
                    {
                        "kind": kind,
                        "recipe": name,
                        "positions": at,
                        "seeds": len(curves),
                        "tokens_per_step": statistics.mean(curve[at] for curve in curves.values()),
                        "difference": statistics.mean(gains),
                        "largest_difference": max(gains),
                    }
                )
    return table


def rows_of(table: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each line of the table."""
    return [
        Row(
            f"{line['kind']}, {line['recipe']}, {line['positions']:,} positions, "
            f"{line['seeds']} seeds",
            f"tokens per step at K = {K}",
            line["tokens_per_step"],
            None,
            None,
        )
        for line in table
    ]


def main(
    out: Out = RESULTS / "recipes.json",
    kinds: str = ",".join(RECIPES),
    updates: Annotated[int, typer.Option(help="of every run")] = 320,
    seeds: int = 3,
    processes: Annotated[int, typer.Option(help="runs at a time")] = 1,
) -> None:
    """Learn by every recipe with every seed."""
    names = known("kinds", kinds.split(","), tuple(RECIPES))
    plan = [(kind, one.name, seed, updates)
            for seed in range(seeds) for kind in names for one in RECIPES[kind]]  # fmt: skip
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        runs = []
        for run in pool.map(run_one, *zip(*plan, strict=True)):
            runs.append(run)
            say(f"{run}")
    table = compared(runs)
    about = {"lr": LR, "updates": updates, "positions_of_an_update": BATCH * LENGTH}
    write_result(out, {**about, "compared": table, "runs": runs})
    write_rows("recipes", rows_of(table), "python -m benchmarks.recipes", out.parent)
    for line in table:
        say(f"{line}")


if __name__ == "__main__":
    typer.run(main)
