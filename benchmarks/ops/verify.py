"""Verification from logits beside what else does it, and beside reading the logits once.

    python -m benchmarks.ops.verify          # about a minute on one GPU

R requests of 4 draft tokens over the 151,936 tokens of Qwen3, bf16 logits. The logits are like a
language model's: 256 likely tokens, p falling with the square of their rank, above a normal bulk;
"flat" ones are the worst case of a cut: a normal bulk alone. Compared are

* ``compiled``: torch.compile of the plain definition in float32, softmax of target and drafter
  (with a sort, where top-p is asked for), ratios, residual, and a draw by exponential noise;
* ``flashinfer``: its softmax, top-p renormalisation and chain_speculative_sampling, if installed,
  on dense drafts of the whole vocabulary, which it needs.

The floor reads all logits, the drafter's too where they are needed, once at 4.24 TB/s.
Writes ``benchmarks/results/ops_verify.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.ops.timing import graphed
from benchmarks.result import write_result
from specops import draft_sampling_triton, verify_logits_triton
from specops.draft_sampling import DraftLaw, RowLaws, VocabMap, vocab_map
from specops.rng import Numbering
from specops.sampling import SamplingRows, sampling_rows
from specops.verify_logits import Rule

try:
    import flashinfer.sampling as flashinfer
except ImportError:
    flashinfer = None

V, D, K = 151_936, 32_000, 4
SIZES = (1, 8, 64)
BYTES_PER_S = 4.24e12


@dataclass(frozen=True)
class Round:
    """What one verification is given."""

    logits_RK1V: Tensor
    sampling: SamplingRows
    draft_RK: Tensor
    lens_R: Tensor
    rules_R: Tensor
    numbering: Numbering
    drafted: DraftLaw | None


def likely_logits(generator: torch.Generator, *shape: int) -> Tensor:
    """[..., V] float32, 256 tokens of p ~ rank ** -2 above a normal bulk."""
    logits = 2.5 * torch.randn(*shape, V, generator=generator, device="cuda")
    places = torch.rand(*shape, V, generator=generator, device="cuda").topk(256).indices
    ranks = torch.arange(1, 257, device="cuda", dtype=torch.float32)
    return logits.scatter_(-1, places, (22 - 2 * ranks.log()).expand(*shape, 256))


def make_round(num_requests: int, top_p: float, draft_size: int | None, flat: bool) -> Round:
    """``draft_size``: tokens of the drafter's vocabulary; ``None`` for delta drafts."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (num_requests, K + 1)
    if flat:
        logits = torch.randn(*shape, V, generator=generator, device="cuda")
    else:
        logits = likely_logits(generator, *shape)
    q_logits = logits[:, :K] + 0.7 * torch.randn(
        num_requests, K, V, generator=generator, device="cuda"
    )
    num = num_requests
    rows = sampling_rows([0.8] * num, [None] * num, [top_p] * num, [0.0] * num, V, "cuda")
    steady = torch.arange(num_requests, device="cuda")
    numbering = Numbering(steady * 7919, steady * 0 + 1, steady + 100)
    lens = torch.full((num_requests,), K, device="cuda")
    rules = torch.full((num_requests,), int(Rule.BLOCK), device="cuda")
    if draft_size is None:
        draft = logits[:, :K].argmax(-1)
        return Round(logits.bfloat16(), rows, draft, lens, rules, numbering, None)
    mapped: VocabMap | None = None
    if draft_size < V:
        chosen = torch.randperm(V, generator=generator, device="cuda")[:draft_size].sort().values
        mapped = vocab_map(chosen - torch.arange(draft_size, device="cuda"), V)
        q_logits = q_logits.index_select(-1, chosen)
    q_logits = q_logits.bfloat16()
    steps = []
    for j in range(K):
        place = Numbering(numbering.keys_R, numbering.nonces_R, numbering.positions_R + j)
        steps.append(draft_sampling_triton.sample_draft(q_logits[:, j], rows, place, None, mapped))
    found = [step.laws for step in steps if step.laws is not None]
    laws = RowLaws(
        torch.stack([law.tops_cuts_masses for law in found], 1),
        torch.stack([law.lasts for law in found], 1),
    )
    draft = torch.stack([step.tokens_R for step in steps], 1)
    drafted = DraftLaw(q_logits, rows, None, mapped, laws)
    return Round(logits.bfloat16(), rows, draft, lens, rules, numbering, drafted)


def ours(given: Round, with_logprobs: bool = False) -> object:
    return verify_logits_triton.verify_logits(
        given.logits_RK1V, given.sampling, given.draft_RK, given.lens_R, given.rules_R,
        given.numbering, given.drafted, with_logprobs,
    )  # fmt: skip


def plain_law(logits: Tensor, temperature_R: Tensor, top_p: float) -> Tensor:
    probs = (logits.float() / temperature_R[:, None, None]).softmax(-1)
    if top_p == 1:
        return probs
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.empty_like(probs).scatter_(-1, ids, ordered)


def plain_sampled(
    logits_RK1V: Tensor,
    q_logits_RKV: Tensor | None,
    draft_RK: Tensor,
    temperature_R: Tensor,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """The standard rule, as one would write it."""
    p = plain_law(logits_RK1V, temperature_R, top_p)
    chance = p[:, :K].gather(-1, draft_RK[..., None])[..., 0]
    at = torch.arange(len(p), device=p.device)
    if q_logits_RKV is None:
        q = None
    else:
        q = plain_law(q_logits_RKV, temperature_R, top_p)
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


def by_flashinfer(given: Round, top_p: float) -> object:
    assert given.drafted is not None
    temperature = given.sampling.temperature_R[:, None, None]
    p = (given.logits_RK1V.float() / temperature).softmax(-1)
    q = (given.drafted.logits_RKD.float() / temperature).softmax(-1)
    if top_p < 1:
        p = flashinfer.top_p_renorm_probs(p.flatten(0, 1), top_p).view_as(p)
        q = flashinfer.top_p_renorm_probs(q.flatten(0, 1), top_p).view_as(q)
    return flashinfer.chain_speculative_sampling(q, given.draft_RK.int(), p)


def figures(
    name: str, num_requests: int, floor_bytes: int, **works: Callable[[], object] | None
) -> dict[str, Any]:
    """Microseconds of each way; those given as ``None`` are not run."""
    row: dict[str, Any] = {
        "case": name,
        "requests": num_requests,
        "floor_us": floor_bytes / BYTES_PER_S * 1e6,
    }
    for kind, work in works.items():
        row[f"{kind}_us"] = None if work is None else graphed(work).median_ms * 1e3
    return row


def sampled_row(
    name: str, num_requests: int, top_p: float, draft_size: int | None, flat: bool = False
) -> dict[str, Any]:
    given = make_round(num_requests, top_p, draft_size, flat)
    q_logits = given.drafted.logits_RKD if given.drafted else None
    num_bytes = given.logits_RK1V.nbytes + (q_logits.nbytes if q_logits is not None else 0)
    is_reduced = draft_size is not None and draft_size < V
    compiled = torch.compile(plain_sampled, dynamic=False)
    temperature = given.sampling.temperature_R
    return figures(
        name,
        num_requests,
        num_bytes,
        ours=lambda: ours(given),
        ours_with_logprobs=lambda: ours(given, with_logprobs=True),
        compiled=None
        if is_reduced
        else lambda: compiled(given.logits_RK1V, q_logits, given.draft_RK, temperature, top_p),
        flashinfer=(lambda: by_flashinfer(given, top_p))
        if flashinfer is not None and draft_size == V
        else None,
    )


def rows() -> list[dict[str, Any]]:
    """One row a case and size: microseconds of a call, ``None`` where there is nothing to run."""
    out = []
    for num_requests in SIZES:
        torch._dynamo.reset()
        out += [
            sampled_row("sampled, delta drafts", num_requests, 1.0, None),
            sampled_row("sampled, drafts of 32,000 tokens", num_requests, 1.0, D),
            sampled_row("sampled, drafts of all tokens", num_requests, 1.0, V),
            sampled_row("top-p 0.9, delta drafts", num_requests, 0.9, None),
            sampled_row("top-p 0.9, drafts of all tokens", num_requests, 0.9, V),
            sampled_row("top-p 0.9, delta drafts, flat", num_requests, 0.9, None, flat=True),
        ]
        torch.cuda.empty_cache()
    return out


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/ops_verify.json"
    ),
) -> None:
    """Measure all cases and print a table."""
    found = rows()
    kinds = ("floor", "ours", "ours_with_logprobs", "compiled", "flashinfer")
    print(f"{'case':36}{'R':>4}" + "".join(f"{kind:>20}" for kind in kinds))
    for row in found:
        times = [row.get(f"{kind}_us") for kind in kinds]
        cells = "".join(f"{'-' if t is None else f'{t:.1f} us':>20}" for t in times)
        print(f"{row['case']:36}{row['requests']:>4}{cells}")
    write_result(out, {"rows": found})


if __name__ == "__main__":
    typer.run(main)
