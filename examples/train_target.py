"""Train the bundled target, ``examples/target``: a small causal LM of Python, C headers and docs.

The script reads text of this installation (``target_text.py``), trains a byte-level BPE tokenizer
of 4,096 tokens and a deep, narrow Qwen3 for a fixed number of seconds on one GPU, and writes a
folder that transformers loads. Each part has a share of the time (``target_plan.py``): reading
stops when its share is used up, and the learning rate reaches zero at the end.

    python -m examples.train_target --out runs/target --seconds 540     # one H200
    python -m examples.train_target --out /tmp/t --small                   # a CPU, to try
    python -m examples.train_target --out /tmp/t --large                   # 520 million, code only

Shapes: B rows, T tokens of context, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.corpus import Domain, Split
from examples.optimisers import Optimisers, new_optimisers, rate_fraction
from examples.target_plan import LARGE, MAX_EPOCHS, SMALL, Clock, Plan
from examples.target_text import END, for_transformers, prepare

# Model


def new_model(plan: Plan) -> Qwen3ForCausalLM:
    """A model whose layers start as the identity: projections into the residual stream are zero."""
    config = Qwen3Config(
        vocab_size=plan.vocab,
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def run_layer(layer: nn.Module, hidden_BTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return layer(hidden_BTH, attention_mask=None, position_embeddings=(cos, sin))


def read_out(norm: nn.Module, head_VH: Tensor, hidden_BTH: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats per token."""
    logits_BTV = F.linear(norm(hidden_BTH), head_VH)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


run_layer_compiled = torch.compile(run_layer, dynamic=False)
"""One compilation serves all layers: 12 s with the capture, on 16 cores."""
read_out_compiled = torch.compile(read_out, dynamic=False)


def loss_of(model: Qwen3ForCausalLM, ids_BT1: Tensor) -> Tensor:
    """Mean nats per token. On a GPU, everything including the residual stream is bf16."""
    inner, device = model.model, ids_BT1.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
    with torch.autocast(device.type, dtype, device.type == "cuda", cache_enabled=False):
        hidden_BTH = inner.embed_tokens(inputs_BT).to(dtype)
        positions_1T = torch.arange(inputs_BT.shape[1], device=device)[None]
        cos, sin = inner.rotary_emb(hidden_BTH, positions_1T)
        for layer in inner.layers:
            hidden_BTH = run_layer_compiled(layer, hidden_BTH, cos, sin)
        return read_out_compiled(inner.norm, inner.embed_tokens.weight, hidden_BTH, targets_BT)


# Training


class Step:
    """One optimiser step on the rows in ``batch_BT1``.

    On a GPU it is one graph replay: a single launch for the 58 ms that an H200 computes per step.
    """

    def __init__(
        self, model: Qwen3ForCausalLM, optimisers: Optimisers, batch_BT1: Tensor, capture: bool
    ) -> None:
        self.model = model
        self.optimisers = optimisers
        self.batch_BT1 = batch_BT1
        self.graph = self._captured() if capture else None

    def __call__(self) -> Tensor:
        """The loss before the step, still on the device; overwritten by the next call."""
        if self.graph is None:
            return self._eager()
        graph, loss = self.graph
        graph.replay()
        return loss

    def _eager(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = loss_of(self.model, self.batch_BT1)
        loss.backward()
        self.optimisers.step()
        return loss.detach()

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a step, after warm-up steps at learning rate zero on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._eager()
        return graph, loss


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids [N] int16 on the device, by domain."""

    train: dict[Domain, Tensor]
    heldout: dict[Domain, Tensor]

    def fill(self, batch_BT1: Tensor, shares: dict[Domain, float]) -> None:
        """Random windows of every domain in proportion to its share."""
        rows, width = batch_BT1.shape
        edges = np.rint(np.cumsum([0.0, *shares.values()]) * rows).astype(int)
        offsets_T1 = torch.arange(width, device=batch_BT1.device)
        for (domain, _), first, last in zip(shares.items(), edges, edges[1:], strict=False):
            ids_N = self.train[domain]
            starts_B1 = torch.randint(len(ids_N) - width, (last - first, 1), device=ids_N.device)
            batch_BT1[first:last] = ids_N[starts_B1 + offsets_T1].long()


@dataclass(frozen=True, slots=True)
class Trained:
    steps: int
    tokens: int
    training_s: float
    """Seconds of training, excluding reading, tokenizing and compiling."""
    shares: dict[Domain, float]


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    clock: Clock,
    out: Path,
) -> Trained:
    """Train until the time is used up. Checkpoints leave a model behind if the run is killed."""
    plan, device = clock.plan, model.device
    batch_BT1 = torch.zeros(plan.rows, plan.context + 1, dtype=torch.long, device=device)
    corpus.fill(batch_BT1, plan.shares)
    optimisers = new_optimisers(model, plan, device)
    step = Step(model, optimisers, batch_BT1, capture=plan.graph and device.type == "cuda")
    shares = shares_for(corpus, step, clock)
    clock.say(f"training with shares {shares}")

    began_s, budget_s, saved_s, num_steps = clock.elapsed_s, clock.training_left_s, 0.0, 0
    while clock.training_left_s > 0:
        progress = 1 - clock.training_left_s / budget_s
        optimisers.set_rate(rate_fraction(plan, num_steps, progress))
        corpus.fill(batch_BT1, shares)
        loss = step()
        num_steps += 1
        if num_steps % 50 == 0:
            report_step(loss.item(), num_steps, num_steps * batch_tokens(plan), clock, began_s)
        if clock.elapsed_s - began_s - saved_s > plan.checkpoint_every_s:
            saved_s = clock.elapsed_s - began_s
            shipped = in_bf16(model)
            save(shipped, tokenizer, out)
            clock.say(f"checkpoint: held-out nats {evaluate(shipped, corpus, plan)}")
    tokens = num_steps * batch_tokens(plan)
    return Trained(num_steps, tokens, clock.elapsed_s - began_s, shares)


def shares_for(corpus: Corpus, step: Step, clock: Clock) -> dict[Domain, float]:
    """The plan's shares, capped at MAX_EPOCHS per domain; Python takes the rest.

    Timed steps at learning rate zero show how many tokens fit into the time.
    """
    step().item()  # compiles if nothing was captured
    before_s = clock.elapsed_s
    for _ in range(10):
        step().item()
    step_s = (clock.elapsed_s - before_s) / 10
    total = max(1.0, clock.training_left_s / step_s * batch_tokens(clock.plan))
    wanted = clock.plan.shares
    most = {domain: MAX_EPOCHS * len(corpus.train[domain]) / total for domain in wanted}
    rest = {d: min(share, most[d]) for d, share in wanted.items() if d != "python"}
    return {"python": 1.0 - sum(rest.values()), **rest}


def batch_tokens(plan: Plan) -> int:
    return plan.rows * plan.context


def report_step(loss: float, steps: int, tokens: int, clock: Clock, began_s: float) -> None:
    """Log one line, and stop early if the run does not learn.

    Raises:
        RuntimeError: after 200 steps the loss is above 6 nats, or is not a number.
    """
    rate = tokens / (clock.elapsed_s - began_s)
    if steps % 200 == 0:
        clock.say(
            f"step {steps}  loss {loss:.3f}  {tokens / 1e6:.0f} M tokens  {rate:,.0f} tokens/s"
        )
    if steps >= 200 and not loss < 6.0:
        raise RuntimeError(f"loss {loss} after {steps} steps: the run is not learning; stopping")


# Saving and evaluation


def in_bf16(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy with bf16 weights, as shipped; the rotary frequencies stay float32."""
    with model.device:
        copy = Qwen3ForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    copy.config.dtype = torch.bfloat16
    return copy


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config.bos_token_id = END
    model.generation_config.eos_token_id = END
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def evaluate(model: Qwen3ForCausalLM, corpus: Corpus, plan: Plan) -> dict[Domain, float]:
    """Held-out nats per token of each domain, in bf16, over windows of the training context."""
    return {
        domain: round(nats_per_token(model, ids_N, plan.context, plan.heldout_windows), 4)
        for domain, ids_N in corpus.heldout.items()
    }


@torch.no_grad()
def nats_per_token(
    model: Qwen3ForCausalLM, ids_N: Tensor, context: int, max_windows: int, rows: int = 16
) -> float:
    """Mean over all tokens but the first of each window."""
    num_windows = min(max_windows, len(ids_N) // context)
    windows = ids_N[: num_windows * context].view(num_windows, context).long()
    total = sum(
        F.cross_entropy(
            model(ids_BT[:, :-1]).logits.flatten(0, 1).float(),
            ids_BT[:, 1:].flatten(),
            reduction="sum",
        ).item()
        for ids_BT in windows.split(rows)
    )
    return total / (num_windows * (context - 1))


def show_samples(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, length: int = 64
) -> None:
    """Print a greedy and a sampled continuation of two held-out prompts per domain."""
    prompts = [
        ids_N[start : start + length]
        for ids_N in corpus.heldout.values()
        for start in (len(ids_N) // 4, len(ids_N) // 2)
    ]
    prompts_BT = torch.stack(prompts).long()
    for name, sampling in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True})):
        outputs = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=length,
            pad_token_id=END,
            **sampling,
        )
        for prompt, ids in zip(prompts_BT, outputs, strict=True):
            print(f"=== {name}\n{tokenizer.decode(prompt)}>>>{tokenizer.decode(ids[length:])}<<<")


# The whole run


def load_corpus(ids: dict[tuple[Domain, Split], np.ndarray], device: torch.device) -> Corpus:
    tensors = {key: torch.from_numpy(part.astype(np.int16)).to(device) for key, part in ids.items()}
    return Corpus(
        train={domain: part for (domain, split), part in tensors.items() if split == "train"},
        heldout={domain: part for (domain, split), part in tensors.items() if split == "heldout"},
    )


def main() -> None:
    plan, out = parse()
    clock = Clock(plan, time.monotonic())
    raw_tokenizer, ids, sizes = prepare(clock)
    tokenizer = for_transformers(raw_tokenizer)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = load_corpus(ids, device)
    with device:
        model = new_model(plan)
    clock.say(f"model: {model.num_parameters():,} parameters")
    trained = train(model, tokenizer, corpus, clock, out)

    shipped = in_bf16(model)
    save(shipped, tokenizer, out)
    nats = evaluate(shipped, corpus, plan)
    clock.say(f"trained: {trained}; held-out nats per token: {nats}")
    figures = {
        "plan": asdict(plan),
        "parameters": model.num_parameters(),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "text": sizes,
        "tokens": {f"{domain} {split}": len(part) for (domain, split), part in ids.items()},
        "trained": asdict(trained),
        "heldout_nats_per_token": nats,
        "run_s": round(clock.elapsed_s, 1),
    }
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    show_samples(shipped, tokenizer, corpus)
    clock.say("done")


def parse() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seconds", type=float, help="duration of the whole run")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a toy of two layers, for a CPU")
    size.add_argument("--large", action="store_true", help="520 million parameters, code only")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel separately")
    given = parser.parse_args()
    plan = SMALL if given.small else LARGE if given.large else Plan()
    seconds = plan.seconds if given.seconds is None else given.seconds
    return replace(plan, seconds=seconds, graph=plan.graph and not given.no_graph), given.out


if __name__ == "__main__":
    main()
