"""Verification from logits, against alternatives and against one read of the logits.

    python -m benchmarks.ops.verify                                   # four minutes on one GPU
    TRITON_INTERPRET=1 python -m benchmarks.ops.verify --device cpu   # without a GPU

R requests of 4 draft tokens over the 151,936 tokens of Qwen3, bf16 logits. The logits resemble a
language model's: 256 likely tokens, with p falling with the square of their rank, above a normally
distributed bulk. "Flat" logits, the bulk alone, are the worst case of truncation. Ours are the
kernels that rounds run, which always check for truncation. They are compared with

* ``compiled``: torch.compile of the plain definition in float32: softmax of target and drafter
  (with a sort for top-p), ratios, residual, and a draw by exponential noise. With a reduced draft
  vocabulary, a scatter expands q to the target's vocabulary;
* ``flashinfer``: its softmax, top-p renormalisation and chain_speculative_sampling. It needs q over
  the whole vocabulary: expanded by a scatter, one-hot for delta drafts.

The floor reads the target's logits, and the drafter's if they are needed, once at the speed of a
large copy. If a variant cannot run, its row says why. Writes ``benchmarks/results/ops_verify.json``
after every row.
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
    target_ids,
)
from benchmarks.ops.place import Device, Place, Work, make_place
from specops import draft_sampling_triton, verify_logits_triton
from specops.draft_sampling import DraftLaw, RowLaws, VocabMap
from specops.rng import Numbering
from specops.sampling import SamplingRows, sampling_rows
from specops.verify_logits import Rule

K = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of round."""

    name: str
    drafts: str
    """``delta``, or drawn from a ``reduced`` or the ``whole`` vocabulary."""
    top_p: float = 1.0
    flat: bool = False


CASES = (
    Case("sampled, delta drafts", "delta"),
    Case("sampled, drafts of 32,000 tokens", "reduced"),
    Case("sampled, drafts of all tokens", "whole"),
    Case("top-p 0.9, delta drafts", "delta", top_p=0.9),
    Case("top-p 0.9, drafts of 32,000 tokens", "reduced", top_p=0.9),
    Case("top-p 0.9, drafts of all tokens", "whole", top_p=0.9),
    Case("top-p 0.9, delta drafts, flat", "delta", top_p=0.9, flat=True),
)


@dataclass(frozen=True, slots=True)
class Round:
    """Inputs of one verification."""

    logits_RK1V: Tensor
    sampling: SamplingRows
    draft_RK: Tensor
    lens_R: Tensor
    rules_R: Tensor
    numbering: Numbering
    drafted: DraftLaw | None


def make_round(case: Case, num_requests: int, sizes: Sizes, device: str) -> Round:
    """Inputs of a case, from a fixed seed."""
    torch.manual_seed(0)
    num, shape = num_requests, (num_requests, K + 1, sizes.vocab)
    logits = (
        torch.randn(*shape, device=device) if case.flat else likely_logits(*shape, device=device)
    )
    rows = sampling_rows(
        [TEMPERATURE] * num, [None] * num, [case.top_p] * num, [0.0] * num, sizes.vocab, device
    )
    rows = replace(rows, truncates=True)
    numbering = numbering_of(num, device)
    lens = torch.full((num,), K, device=device)
    rules = torch.full((num,), int(Rule.BLOCK), device=device)
    if case.drafts == "delta":
        draft, drafted = logits[:, :K].argmax(-1), None
    else:
        draft, drafted = drawn_drafts(logits[:, :K], case, sizes, rows, numbering)
    return Round(logits.bfloat16(), rows, draft, lens, rules, numbering, drafted)


def drawn_drafts(
    logits_RKV: Tensor, case: Case, sizes: Sizes, rows: SamplingRows, numbering: Numbering
) -> tuple[Tensor, DraftLaw]:
    """[R, K] tokens of a drafter whose logits are the target's plus noise."""
    q_logits = logits_RKV + 0.7 * torch.randn_like(logits_RKV)
    mapped = None
    if case.drafts == "reduced":
        mapped = make_vocab(sizes, str(q_logits.device))
        q_logits = q_logits.index_select(-1, target_ids(mapped))
    q_logits = q_logits.bfloat16()
    by_match = torch.zeros(len(q_logits), dtype=torch.bool, device=q_logits.device)
    sample = draft_sampling_triton.sample_draft
    steps = []
    for j in range(K):
        place = replace(numbering, positions_R=numbering.positions_R + j)
        steps.append(sample(q_logits[:, j], rows, place, by_match, mapped))
    found = [step.laws for step in steps if step.laws is not None]
    laws = RowLaws(
        torch.stack([law.tops_cuts_masses for law in found], 1),
        torch.stack([law.lasts for law in found], 1),
    )
    draft = torch.stack([step.tokens_R for step in steps], 1)
    return draft, DraftLaw(q_logits, rows, by_match, mapped, laws)


def ours(given: Round, with_logprobs: bool = False) -> object:
    return verify_logits_triton.verify_logits(
        given.logits_RK1V, given.sampling, given.draft_RK, given.lens_R, given.rules_R,
        given.numbering, given.drafted, with_logprobs,
    )  # fmt: skip


def by_scatter(q_RKD: Tensor, vocab: VocabMap) -> Tensor:
    """[R, K, V]: q over the target's vocabulary."""
    q_RKV = q_RKD.new_zeros((*q_RKD.shape[:-1], len(vocab.t2d_V)))
    return q_RKV.index_copy(-1, target_ids(vocab), q_RKD)


def plain_draft_law(given: Round, top_p: float) -> Tensor | None:
    """q over the target's vocabulary; ``None`` for delta drafts."""
    if given.drafted is None:
        return None
    q = plain_law(given.drafted.logits_RKD, given.sampling.temperature_R[:, None, None], top_p)
    return q if given.drafted.vocab is None else by_scatter(q, given.drafted.vocab)


def plain_sampled(given: Round, top_p: float) -> tuple[Tensor, Tensor]:
    """The standard rule in plain torch."""
    p = plain_law(given.logits_RK1V, given.sampling.temperature_R[:, None, None], top_p)
    draft_RK = given.draft_RK
    chance = p[:, :K].gather(-1, draft_RK[..., None])[..., 0]
    at = torch.arange(len(p), device=p.device)
    q = plain_draft_law(given, top_p)
    if q is not None:
        chance = chance / q.gather(-1, draft_RK[..., None])[..., 0]
    kept = torch.rand_like(chance) < chance
    accepted = kept.long().cumprod(1).sum(1)
    law = p[at, accepted]
    inside = accepted.clamp(max=K - 1)
    if q is None:
        rest = law.scatter(-1, draft_RK[at, inside][:, None], 0.0)
    else:
        rest = (law - q[at, inside]).clamp(min=0)
    law = torch.where((accepted < K)[:, None], rest, law)
    return accepted, (law / torch.empty_like(law).exponential_()).argmax(-1)


def flashinfer_work(given: Round, top_p: float) -> Work:
    """Seeds are tensors, because a CUDA graph cannot capture other seeds."""
    from flashinfer import sampling

    device = given.logits_RK1V.device
    seed, offset = torch.zeros((2, 1), dtype=torch.int64, device=device)
    draft_RK = given.draft_RK.int()
    heat = {rows: given.sampling.temperature_R.repeat_interleave(rows) for rows in (K, K + 1)}

    def law(logits: Tensor) -> Tensor:
        probs: Tensor = sampling.softmax(logits.flatten(0, 1), heat[logits.shape[1]])
        if top_p < 1:
            probs = sampling.top_p_renorm_probs(probs, top_p)
        return probs.view(logits.shape)

    def work() -> object:
        p = law(given.logits_RK1V)
        if given.drafted is None:
            q = torch.zeros_like(p[:, :K]).scatter_(-1, given.draft_RK[..., None], 1.0)
        else:
            q, vocab = law(given.drafted.logits_RKD), given.drafted.vocab
            q = q if vocab is None else by_scatter(q, vocab)
        return sampling.chain_speculative_sampling(q, draft_RK, p, seed=seed, offset=offset)

    return work


def row_of(case: Case, num_requests: int, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Microseconds per call of each variant."""
    given = make_round(case, num_requests, sizes, place.device)
    q_logits = given.drafted.logits_RKD if given.drafted else None
    num_bytes = given.logits_RK1V.nbytes + (q_logits.nbytes if q_logits is not None else 0)
    row: dict[str, Any] = {
        "case": case.name,
        "requests": num_requests,
        "floor_us": place.floor_us(num_bytes),
        "ours_us": place.microseconds(lambda: ours(given)),
        "ours_with_logprobs_us": place.microseconds(lambda: ours(given, with_logprobs=True)),
    }
    return {**row, **alternatives(case, given, place)}


def alternatives(case: Case, given: Round, place: Place) -> dict[str, float | str]:
    return {
        "compiled_us": place.compiled_microseconds(lambda: plain_sampled(given, case.top_p)),
        "flashinfer_us": place.tried_microseconds(lambda: flashinfer_work(given, case.top_p)),
    }


def rows(sizes: Sizes, place: Place) -> Iterator[dict[str, Any]]:
    """One row per case and number of requests."""
    for num_requests in sizes.requests:
        for case in CASES:
            yield row_of(case, num_requests, sizes, place)
            if place.is_gpu:
                torch.cuda.empty_cache()


def main(
    out: Out = RESULTS / "ops_verify.json",
    device: Device = "cuda",
    budget_s: Annotated[float, typer.Option(help="nothing is compiled after this")] = 300.0,
) -> None:
    """Measure all cases and print a line for each."""
    place = make_place(device, budget_s)
    cases = rows(Sizes() if place.is_gpu else TINY, place)
    write_each(out, cases, bytes_per_s=place.bytes_per_s)


if __name__ == "__main__":
    typer.run(main)
