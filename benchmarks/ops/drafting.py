"""Choosing a draft token from a drafter's logits, greedily or by sampling, against alternatives.

    python -m benchmarks.ops.drafting                                   # two minutes on one GPU
    TRITON_INTERPRET=1 python -m benchmarks.ops.drafting --device cpu   # without a GPU

R requests with one draft token each, from a reduced vocabulary of 32,000 tokens mapped to the
151,936 of Qwen3; bf16 logits with 256 likely tokens above a normally distributed bulk. ``greedy``
is ``best_ids``. Sampled tokens come with log q, use temperature 0.8, and are truncated as their row
says; ours are the kernels that rounds run, which always check for truncation. The alternatives are

* ``eager``: plain torch in float32: argmax and the map; or softmax, a top-k or a sort if truncated,
  a draw by exponential noise, q of the token, and the map;
* ``compiled``: torch.compile of ``eager``;
* ``flashinfer``: its softmax, renormalisation after truncation, and draw; q and the map in torch.

The floor reads the logits once at the speed of a large copy. If a variant cannot run, its row says
why. Writes ``benchmarks/results/ops_drafting.json`` after every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.laws import (
    TEMPERATURE,
    TINY,
    Sizes,
    likely_logits,
    make_vocab,
    numbering_of,
    plain_law,
)
from benchmarks.ops.place import Device, Place, Work, make_place
from specops import best_ids, best_ids_triton, draft_sampling_triton
from specops import device as on_device
from specops.draft_sampling import VocabMap
from specops.sampling import sampling_rows


@dataclass(frozen=True, slots=True)
class Cut:
    """How a distribution is truncated before a token is drawn from it."""

    name: str
    top_k: int | None = None
    top_p: float = 1.0


CUTS = (
    Cut("sampled"),
    Cut("sampled, top-p 0.9", top_p=0.9),
    Cut("sampled, top-k 20", top_k=20),
    Cut("sampled, top-k 20, top-p 0.95", top_k=20, top_p=0.95),
)


def greedy_work(logits: Tensor, vocab: VocabMap) -> Work:
    """Our greedy kernel."""
    if logits.is_cuda:
        return lambda: on_device.best_ids(logits, vocab.d2t_D)
    return lambda: best_ids_triton.best_ids(logits, vocab.d2t_D)


def sampled_work(logits: Tensor, vocab: VocabMap, cut: Cut) -> Work:
    """Our kernel for a round of sampled requests."""
    num, size = logits.shape
    device = logits.device
    top_k, top_p = [cut.top_k] * num, [cut.top_p] * num
    rows = sampling_rows([TEMPERATURE] * num, top_k, top_p, [0.0] * num, size, device)
    rows = replace(rows, truncates=True)
    numbering = numbering_of(num, str(device))
    by_match = torch.zeros(num, dtype=torch.bool, device=device)
    sample = draft_sampling_triton.sample_draft

    def work() -> object:
        drafted = sample(logits, rows, numbering, by_match, vocab)
        return drafted.tokens_R, drafted.logq_R

    return work


def plain_sampled(logits: Tensor, d2t_D: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Target ids and log q."""
    q = plain_law(logits, TEMPERATURE, cut.top_p, cut.top_k)
    ids = (q / torch.empty_like(q).exponential_()).argmax(-1)
    return ids + d2t_D[ids], q.gather(-1, ids[:, None])[:, 0].log()


def flashinfer_work(logits: Tensor, d2t_D: Tensor, cut: Cut) -> Work:
    """Seeds are tensors, because a CUDA graph cannot capture other seeds."""
    from flashinfer import sampling

    seed, offset = torch.zeros((2, 1), dtype=torch.int64, device=logits.device)

    def work() -> object:
        q = sampling.softmax(logits, TEMPERATURE)
        if cut.top_k is not None:
            q = sampling.top_k_renorm_probs(q, cut.top_k)
        if cut.top_p < 1:
            q = sampling.top_p_renorm_probs(q, cut.top_p)
        ids = sampling.sampling_from_probs(q, seed=seed, offset=offset).long()
        return ids + d2t_D[ids], q.gather(-1, ids[:, None])[:, 0].log()

    return work


def greedy_row(place: Place, logits: Tensor, vocab: VocabMap) -> dict[str, Any]:
    def plain() -> Tensor:
        return best_ids.best_ids(logits, vocab.d2t_D)

    return {
        "case": "greedy",
        "requests": len(logits),
        "floor_us": place.floor_us(logits.nbytes),
        "ours_us": place.microseconds(greedy_work(logits, vocab)),
        "eager_us": place.microseconds(plain),
        "compiled_us": place.compiled_microseconds(plain),
    }


def sampled_row(place: Place, logits: Tensor, vocab: VocabMap, cut: Cut) -> dict[str, Any]:
    def plain() -> tuple[Tensor, Tensor]:
        return plain_sampled(logits, vocab.d2t_D, cut)

    return {
        "case": cut.name,
        "requests": len(logits),
        "floor_us": place.floor_us(logits.nbytes),
        "ours_us": place.microseconds(sampled_work(logits, vocab, cut)),
        "eager_us": place.microseconds(plain),
        "compiled_us": place.compiled_microseconds(plain),
        "flashinfer_us": place.tried_microseconds(
            lambda: flashinfer_work(logits, vocab.d2t_D, cut)
        ),
    }


def rows(sizes: Sizes, place: Place) -> Iterator[dict[str, Any]]:
    """One row per case and number of requests."""
    torch.manual_seed(0)
    vocab = make_vocab(sizes, place.device)
    for num_requests in sizes.requests:
        logits = likely_logits(num_requests, sizes.draft_vocab, device=place.device).bfloat16()
        yield greedy_row(place, logits, vocab)
        for cut in CUTS:
            yield sampled_row(place, logits, vocab, cut)


def main(
    out: Out = RESULTS / "ops_drafting.json",
    device: Device = "cuda",
    budget_s: Annotated[float, typer.Option(help="nothing is compiled after this")] = 180.0,
) -> None:
    """Measure all cases and print a line for each."""
    place = make_place(device, budget_s)
    with torch.inference_mode():
        cases = rows(Sizes() if place.is_gpu else TINY, place)
        write_each(out, cases, bytes_per_s=place.bytes_per_s)


if __name__ == "__main__":
    typer.run(main)
