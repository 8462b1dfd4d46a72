"""Train the bundled drafter: EAGLE-3 on the target's own continuations of Python only.

It stands for the drafter of a team on the day before its traffic shifts. A few minutes on one GPU:

    python -m examples.train_drafter --target examples/target --out examples/drafter

The target continues Python of the training split by sampling. Its hidden rows are recomputed when
they are needed, so nothing is stored. The bundle is version 0, in ``OUT/0``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from buffer.fingerprint import target_fingerprint
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Manifest
from drafters.acceptance import conditional_acceptance, simulated_tokens_per_step
from drafters.batch import TrainingBatch, from_sequences
from drafters.eagle3.model import Eagle3, config_for_target
from drafters.eagle3.training import ChainPlan, chain_acceptance, ttt_loss
from examples.corpus import Domain, read, sources
from specops.distill import FrozenHead

CONTINUATION = 160
PROMPT_TOKENS = (32, 64, 96, 128)
ROLLOUT_BATCH = 2048
MAX_FILES = 3000
EVAL_SEQUENCES = 128


def pieces(tokenizer: Any, domain: Domain, split: str, count: int, seed: int) -> list[list[int]]:
    """Up to ``count`` pieces of PROMPT_TOKENS tokens that start at a line of a random document."""
    numbers = random.Random(seed)
    files = [source for source in sources(domain) if source.split == split]
    chosen = numbers.sample(files, min(MAX_FILES, len(files)))
    texts = [document.text for document in map(read, chosen) if document is not None]
    found = []
    for _ in range(count * 4):
        text = numbers.choice(texts)
        at = text.rfind("\n", 0, numbers.randrange(len(text))) + 1
        ids = tokenizer(text[at : at + 1200], add_special_tokens=False)["input_ids"]
        length = numbers.choice(PROMPT_TOKENS)
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == count:
            break
    return found


def rollouts(model: Any, prompts: list[list[int]], greedy_share: float) -> Iterator[Tensor]:
    """The target's continuations [B, prompt + CONTINUATION], batched by prompt length."""
    by_length: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    for group in by_length.values():
        for start in range(0, len(group), ROLLOUT_BATCH):
            ids = torch.tensor(group[start : start + ROLLOUT_BATCH], device=model.device)
            cut = int(len(ids) * greedy_share)
            for part, sample in ((ids[:cut], False), (ids[cut:], True)):
                if len(part):
                    yield continued(model, part, sample)


@torch.no_grad()
def continued(model: Any, ids: Tensor, sample: bool) -> Tensor:
    """Batched continuation of CONTINUATION tokens; end-of-text does not stop it."""
    cache, step = None, ids
    out = ids
    for _ in range(CONTINUATION):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = result.past_key_values, result.logits[:, -1].float()
        step = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, True)
        out = torch.cat((out, step), dim=1)
    return out


@torch.no_grad()
def batch_of(
    model: Any, ids_BS: Tensor, layer_ids: tuple[int, ...], prompt: int, temperature: float = 1.0
) -> TrainingBatch:
    """Batch of ids [B, S] with the target's rows; the loss starts at the last prompt row."""
    out = model.model(input_ids=ids_BS, output_hidden_states=True, use_cache=False)
    features = torch.cat([out.hidden_states[k] for k in layer_ids], dim=-1)
    places = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    known = torch.ones_like(ids_BS, dtype=torch.bool)
    loss = (places >= prompt - 1) & (places < ids_BS.shape[1] - 1)
    heat = torch.full((len(ids_BS),), temperature)
    return from_sequences(ids_BS, places, features, out.last_hidden_state, known, loss, heat)


def train(
    model: Any, drafter: Eagle3, data: list[tuple[Tensor, int]], seconds: float, batch: int
) -> int:
    """Minimise the LK hybrid for ``seconds``; returns the number of updates."""
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    embed = model.get_input_embeddings().weight.detach()
    head = FrozenHead(model.get_output_embeddings().weight.detach())
    plan = ChainPlan(num_steps=5, chunk_rows=8192)
    numbers = random.Random(0)
    started, step, printed = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - started) < seconds:
        progress = elapsed / seconds
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * max(0.02, 1 - progress)
        ids, prompt = numbers.choice(data)
        index = torch.randint(len(ids), (min(batch, len(ids)),), device=ids.device)
        rows = batch_of(model, ids[index], drafter.config.layer_ids, prompt)
        judged = ttt_loss(drafter, embed, head, rows, plan)
        judged.loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if elapsed - printed > 10:
            printed = elapsed
            alphas = [round(a, 3) for a in judged.alpha_K.tolist()]
            print(f"{elapsed:6.1f} s step {step} loss {judged.loss.item():.4f} alpha {alphas}")
    return step


def held_out_figures(model: Any, tokenizer: Any, drafter: Eagle3) -> dict[str, Any]:
    """Greedy simulated tokens_per_step at K=4 and acceptance by position, for each domain."""
    embed = model.get_input_embeddings().weight.detach()
    figures = {}
    for domain in ("python", "c", "docs"):
        prompts = [p for p in pieces(tokenizer, domain, "heldout", 4096, 1) if len(p) == 64]
        ids = torch.tensor(prompts[:EVAL_SEQUENCES], device=model.device)
        ids = continued(model, ids, sample=False)
        rows = batch_of(model, ids, drafter.config.layer_ids, 64, temperature=0.0)
        head = FrozenHead(model.get_output_embeddings().weight.detach())
        found = chain_acceptance(drafter, embed, head, rows, num_steps=8)
        alphas = found.overlap_RK[found.is_full_R]
        figures[domain] = {
            "tokens_per_step_k4": simulated_tokens_per_step(alphas, 4),
            "acceptance": [a for a in conditional_acceptance(alphas) if a is not None],
        }
        print(domain, figures[domain])
    return figures


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")] = Path("examples/target"),
    out: Annotated[Path, typer.Option(help="folder that bundle 0 is written to")] = Path(
        "examples/drafter"
    ),
    minutes: Annotated[float, typer.Option(help="training time")] = 1.8,
    num_prompts: Annotated[int, typer.Option(help="pieces of Python to continue")] = 6_144,
    batch: Annotated[int, typer.Option(help="sequences per update")] = 64,
    greedy_share: Annotated[
        float,
        typer.Option(help="share of greedy continuations; others are sampled", min=0, max=1),
    ] = 0.0,
    intermediate: Annotated[
        int | None, typer.Option(help="width of the MLP; default: the target's")
    ] = None,
) -> None:
    """Roll out, train, judge, publish."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(target)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device)
    model.eval().requires_grad_(False)
    torch.backends.cuda.matmul.allow_tf32 = True
    started = time.monotonic()
    prompts = pieces(tokenizer, "python", "train", num_prompts, 0)
    data = [(ids, ids.shape[1] - CONTINUATION) for ids in rollouts(model, prompts, greedy_share)]
    num_tokens = sum(ids.shape[0] * CONTINUATION for ids, _ in data)
    rollout_s = time.monotonic() - started
    print(f"{len(prompts)} continuations, {num_tokens} tokens, {rollout_s:.0f} s")
    config = config_for_target(model.config)
    if intermediate is not None:
        config = replace(config, intermediate_size=intermediate)
    drafter = Eagle3(config).to(device)
    drafter.initialise(0, model.get_output_embeddings().weight)
    steps = train(model, drafter, data, minutes * 60, batch)
    figures = held_out_figures(model, tokenizer, drafter)
    manifest = Manifest(
        version=0,
        parent=None,
        kind="eagle3",
        drafter_config=drafter.config.to_json(),
        target_fingerprint=target_fingerprint(target),
        files={},
        gate={domain: values["tokens_per_step_k4"] for domain, values in figures.items()},
        policy={"acceptance": figures["python"]["acceptance"]},
        created_unix_ms=int(time.time() * 1000),
    )
    tensors = {name: t.to("cpu", torch.bfloat16) for name, t in drafter.bundle_tensors().items()}
    FolderWeights(out).publish(manifest, {TENSORS: save(tensors)})
    record = {
        "trained_on": "continuations of Python, by the target",
        "greedy_share": greedy_share,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "num_continuations": len(prompts),
        "num_tokens": num_tokens,
        "rollout_s": round(rollout_s, 1),
        "train_s": round(minutes * 60, 1),
        "updates": steps,
        "sequences_per_update": batch,
        "num_parameters": sum(p.numel() for p in drafter.parameters()),
        "held_out": figures,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
