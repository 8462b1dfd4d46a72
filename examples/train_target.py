"""Train the bundled target, ``examples/target``: a small causal LM of Python, C headers and docs.

The road from start to end: text of this installation (``corpus.py``), a byte-level BPE tokenizer
of 4,096, a deep and narrow Qwen3, one GPU, a fixed number of seconds, a folder that transformers
loads. Everything follows the clock: reading stops at its share, and the learning rate reaches zero
at the end.

    python -m examples.train_target --out runs/target --seconds 540     # one H200
    python -m examples.train_target --out /tmp/t --small                   # a CPU, to try
    python -m examples.train_target --out /tmp/t --large                   # half a billion, of code

Shapes: B rows, T tokens of context, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.corpus import Document, Domain, Source, Split, read, sources, unique

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
END, USER, ASSISTANT = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}\n"
    "{{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_ONE_IN = 32
"""Documents given as a chat turn, cut in two at a line end, so that those tokens mean something."""

WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen's pre-tokenizer: one token may hold a line end with its punctuation, or an indentation."""

SHARES: dict[Domain, float] = {"python": 0.45, "c": 0.25, "docs": 0.30}
MAX_EPOCHS = 30.0
"""A domain with too little text leaves its surplus to Python, which has the most.

Too many for docs: the bundled target's held-out loss there was 2.18 after 13 epochs and 2.28 after
28, while code went on improving. Lower it before training another one.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run may use. The defaults are the bundled target's."""

    seconds: float = 540.0
    """Of the whole run, from the start of ``main``."""
    reading_s: float = 48.0
    """After this, whatever text was not read yet is left out."""
    closing_s: float = 25.0
    """Kept for the last evaluation, the samples and the saving."""
    max_chars: int = 200_000_000
    """Per domain."""
    tokenizer_chars: int = 16_000_000
    """Sampled from all domains, by their shares."""
    shares: dict[Domain, float] = field(default_factory=SHARES.copy)
    """Of the tokens trained on; a domain that is not named is not read."""
    vocab: int = 4096
    """At most 32,768: ids are kept in 16 bits."""
    num_layers: int = 16
    hidden: int = 256
    intermediate: int = 624
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rows: int = 128
    """Per step: 131,072 tokens."""
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_from: float = 0.4
    """Fraction of the training time after which the learning rate falls linearly to zero."""
    checkpoint_every_s: float = 110.0
    heldout_windows: int = 400
    """Per domain, of ``context`` tokens."""
    graph: bool = True
    """On a GPU, replay the whole step as one graph."""


SMALL = Plan(
    seconds=240, reading_s=75, closing_s=15, max_chars=2_000_000, tokenizer_chars=1_000_000,
    num_layers=2, hidden=128, intermediate=256, num_heads=2, num_kv_heads=1, context=128, rows=16,
    checkpoint_every_s=30, heldout_windows=32,
)  # fmt: skip

LARGE = Plan(
    seconds=270, reading_s=24, closing_s=18, max_chars=80_000_000, tokenizer_chars=12_000_000,
    shares={"python": 0.6, "c": 0.4}, vocab=16_384, num_layers=32, hidden=1024, intermediate=3072,
    num_heads=16, num_kv_heads=8, head_dim=128, rows=32, muon_lr=2.5e-3, adam_lr=2e-3,
    warmup_steps=40, checkpoint_every_s=600, heldout_windows=100, graph=False,
)  # fmt: skip
"""520 million parameters: 32 layers of Qwen3-0.6B's shape. A step of 32,768 tokens is computed long
enough to hide its launches, and no graph has to hold its 50 GB of activations a second time."""


# Text

READING: tuple[tuple[Domain, float], ...] = (("docs", 0.6), ("c", 0.7), ("python", 1.0))
"""Domains in the order of reading, and which share of the time that is left each may take."""


def gather(plan: Plan, pool: ProcessPoolExecutor) -> dict[tuple[Domain, Split], list[Document]]:
    """Documents of every domain and split. Text that is held out is in no training document."""
    deadline = time.monotonic() + plan.reading_s
    found: dict[tuple[Domain, Split], list[Document]] = {}
    for domain, share_s in READING:
        if domain not in plan.shares:
            continue
        seen: set[bytes] = set()
        until = time.monotonic() + share_s * (deadline - time.monotonic())
        for split in ("heldout", "train"):
            chosen = [source for source in sources(domain) if source.split == split]
            random.Random(0).shuffle(chosen)
            read_ones = read_until(chosen, until, pool)
            found[domain, split] = list(take(unique(domain, read_ones, seen), plan.max_chars))
    return found


def read_until(
    chosen: Sequence[Source], until: float, pool: ProcessPoolExecutor
) -> Iterator[Document]:
    """Read in parallel, in order; stop at the monotonic time ``until``."""
    for start in range(0, len(chosen), 2048):
        if time.monotonic() > until:
            return
        yield from filter(None, pool.map(read, chosen[start : start + 2048], chunksize=16))


def take(found: Iterator[Document], max_chars: int) -> Iterator[Document]:
    num_chars = 0
    for document in found:
        num_chars += len(document.text)
        if num_chars > max_chars:
            return
        yield document


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_texts(found: dict[tuple[Domain, Split], list[Document]], plan: Plan) -> Iterator[str]:
    for domain, share in plan.shares.items():
        for document in take(iter(found[domain, "train"]), int(share * plan.tokenizer_chars)):
            yield document.text


def encode(found: Sequence[Document], tokenizer_json: str, pool: ProcessPoolExecutor) -> np.ndarray:
    """[N] uint16: every document between end-of-text tokens, in random order."""
    order = random.Random(1).sample(list(found), len(found))
    batches = [order[start : start + 128] for start in range(0, len(order), 128)]
    return np.concatenate(list(pool.map(partial(encode_batch, tokenizer_json), batches)))


def encode_batch(tokenizer_json: str, found: Sequence[Document]) -> np.ndarray:
    tokenizer = _tokenizer(tokenizer_json)
    ids = [END]
    for index, document in enumerate(found):
        as_chat = index % CHAT_ONE_IN == 0
        ids += (
            chat_ids(tokenizer, document.text) if as_chat else plain_ids(tokenizer, document.text)
        )
        ids.append(END)
    return np.array(ids[1:], dtype=np.uint16)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The document's first lines as the question, the rest as the answer: see CHAT_TEMPLATE."""
    question = text[: max(text.find("\n", 300), 0) or len(text) // 2]
    answer = text[len(question) :].strip("\n")
    return [
        *(USER, *plain_ids(tokenizer, f"\n{question}\n")),
        *(ASSISTANT, *plain_ids(tokenizer, f"\n{answer}\n")),
    ]


@cache
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # sources that spell them out are text like any other
    return tokenizer


# Model


def new_model(plan: Plan) -> Qwen3ForCausalLM:
    """Every layer starts as the identity: what writes to the residual stream starts at zero."""
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
    """Mean nats per token. On a GPU in bf16, the residual stream included."""
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


# Optimisers


class Muon:
    """Momentum whose update is made orthogonal; for the matrices of the layers.

    Matrices of one shape are handled together, so that launches do not grow with the depth.
    Updates have a root mean square of about 0.2 lr, as AdamW's do.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale of Liu et al. 2025,
    arXiv:2502.16982, Section 2.2.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        self.groups = [[m for m in matrices if m.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(group)) for group in self.groups]
        self.lr = lr
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95)).float()
            update *= 0.2 * math.sqrt(max(update.shape[1:])) * self.lr
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            torch._foreach_sub_(group, list(update.unbind(0)))


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end between 0.7 and 1.2."""
    if matrices_NRC.shape[1] > matrices_NRC.shape[2]:
        return orthogonal(matrices_NRC.mT).mT
    x = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@dataclass(frozen=True, slots=True)
class Optimisers:
    muon: Muon
    adam: torch.optim.AdamW
    muon_lr: float
    adam_lr: float

    def set_rate(self, fraction: float) -> None:
        """Takes effect in replayed graphs too: the rates are tensors on the device."""
        self.muon.lr.fill_(self.muon_lr * fraction)
        self.adam.param_groups[0]["lr"].fill_(self.adam_lr * fraction)

    def step(self) -> None:
        self.muon.step()
        self.adam.step()


def new_optimisers(model: Qwen3ForCausalLM, plan: Plan, device: torch.device) -> Optimisers:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    on_gpu = device.type == "cuda"
    adam = torch.optim.AdamW(
        rest,
        lr=torch.zeros((), device=device),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=on_gpu,
        capturable=on_gpu,
    )
    muon = Muon(matrices, torch.zeros((), device=device), plan.weight_decay)
    return Optimisers(muon, adam, plan.muon_lr, plan.adam_lr)


def rate_fraction(plan: Plan, step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then linear to zero by ``progress`` in [0, 1]."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - plan.decay_from))


# Training


class Step:
    """One optimiser step on the rows in ``batch_BT1``; on a GPU, one graph replay.

    One launch, then, beside the 58 ms that an H200 computes per step.
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
        """Compile and fill the optimisers' state on a side stream first, at learning rate zero."""
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
class Clock:
    """What each part of the run may take follows from when the run began."""

    plan: Plan
    started: float
    """Monotonic seconds."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def training_left_s(self) -> float:
        return self.plan.seconds - self.plan.closing_s - self.elapsed_s

    def say(self, text: str) -> None:
        print(f"{self.elapsed_s:7.1f} s  {text}", flush=True)


@dataclass(frozen=True, slots=True)
class Trained:
    steps: int
    tokens: int
    training_s: float
    """Without reading, tokenizing and compiling."""
    shares: dict[Domain, float]


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    clock: Clock,
    out: Path,
) -> Trained:
    """Step until the clock says so. Checkpoints on the way, so that a killed run left a model."""
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
    """The plan's, with what would exceed MAX_EPOCHS of a domain given to Python.

    Steps at learning rate zero say how many tokens the time is enough for.
    """
    step().item()  # compiles, where nothing was captured
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
    """Log one line; give up early on a run that does not learn.

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


# What is kept


def in_bf16(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy with the weights as they are shipped; the rotary frequencies stay float32."""
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


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[END],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=list(SPECIAL_TOKENS[USER:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


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
    """Mean over every token that has another before it in its window."""
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
    """Print two held-out beginnings of every domain with a greedy and a sampled continuation."""
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


# The road


def prepare(clock: Clock) -> tuple[Tokenizer, dict[tuple[Domain, Split], np.ndarray], dict]:
    """Text of this installation to token ids, on all cores. Forks: call it before CUDA starts."""
    with ProcessPoolExecutor() as pool:
        found = gather(clock.plan, pool)
        sizes = {f"{d} {split}": text_size(texts) for (d, split), texts in found.items()}
        clock.say(f"read: {sizes}")
        tokenizer = train_tokenizer(tokenizer_texts(found, clock.plan), clock.plan.vocab)
        clock.say("tokenizer trained")
        ids = {key: encode(texts, tokenizer.to_str(), pool) for key, texts in found.items()}
        clock.say("encoded: " + ", ".join(f"{key} {len(part):,}" for key, part in ids.items()))
    return tokenizer, ids, sizes


def text_size(found: Sequence[Document]) -> dict[str, float]:
    num_bytes = sum(len(document.text.encode()) for document in found)
    return {"documents": len(found), "MB": round(num_bytes / 1e6, 2)}


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
    parser.add_argument("--seconds", type=float, help="of the whole run")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a toy of two layers, for a CPU")
    size.add_argument("--large", action="store_true", help="520 million parameters, of code alone")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel by itself")
    given = parser.parse_args()
    plan = SMALL if given.small else LARGE if given.large else Plan()
    seconds = plan.seconds if given.seconds is None else given.seconds
    return replace(plan, seconds=seconds, graph=plan.graph and not given.no_graph), given.out


if __name__ == "__main__":
    main()
