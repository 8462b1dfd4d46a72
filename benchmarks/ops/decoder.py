"""One decode step of a whole target in a CUDA graph, fused and by Hugging Face's code.

    python -m benchmarks.ops.decoder                       # 0.6B and 8B; about a minute
    python -m benchmarks.ops.decoder --models all

Weights are random, shapes are the published ones. A step is the embedding, all layers over a filled
pool of pages, the final norm and the logits of every row. The floor is the bytes of all weights and
of the keys and values in the context over the bandwidth of a large copy. Hugging Face's forward has
its norms fused and the same attention kernel, as served without the fused decoder.

Writes ``benchmarks/results/ops_decoder.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.harness.results import write_result
from benchmarks.harness.shapes import LARGE, SHAPES, floor_bytes, random_weights
from benchmarks.ops.timing import copy_bytes_per_s, graphed
from specops.attention import DecodePass, decode_slots
from specops.device import decode_attention
from specops.overlap_triton import can_overlap
from targets.fused import FusedDecoder
from targets.target import KvPool, fuse_norms

_NAME = "slipstream_benchmark"
_PAGE = 16


def _hugging_face_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None,
    *, step: Step, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layer = module.layer_idx
    step.pool.keys[layer].index_copy_(0, step.slots_T, key[0].transpose(0, 1))
    step.pool.values[layer].index_copy_(0, step.slots_T, value[0].transpose(0, 1))
    return step.attend(layer, query[0].transpose(0, 1))[None], None


AttentionInterface.register(_NAME, _hugging_face_attention)


def random_model(config: Any) -> Any:
    """A model on the GPU in bfloat16, with this benchmark's attention."""
    model = random_weights(config, torch.device("cuda"), torch.bfloat16)
    fuse_norms(model)
    model.set_attn_implementation(_NAME)
    return model


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of ``batch`` requests, ``num_query`` rows each, that see ``context`` positions."""

    batch: int
    num_query: int
    context: int
    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    pool: KvPool
    attend: Callable[[int, Tensor], Tensor]


def make_step(config: Any, batch: int, num_query: int, context: int) -> Step:
    num_pages = context // _PAGE
    pool = KvPool(
        config.num_hidden_layers, (batch * num_pages + 1) * _PAGE, config.num_key_value_heads,
        config.head_dim, torch.bfloat16, torch.device("cuda"),
    )  # fmt: skip
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    pages = torch.randperm(batch * num_pages, device="cuda", dtype=torch.int32) + 1
    first = torch.full((batch,), context - num_query, device="cuda", dtype=torch.int32)
    at = DecodePass(pages.view(batch, num_pages), first, _PAGE)
    scale = config.head_dim**-0.5

    def attend(layer: int, q_THD: Tensor) -> Tensor:
        return decode_attention(q_THD, None, None, pool.keys[layer], pool.values[layer], at, scale)

    ids = torch.randint(0, config.vocab_size, (batch * num_query,), device="cuda")
    positions, slots = at.positions(num_query).flatten(), decode_slots(at, num_query)
    return Step(batch, num_query, context, ids, positions, slots, pool, attend)


def by_hugging_face(model: Any, step: Step) -> Tensor:
    hidden = model.model(
        input_ids=step.ids_T[None], position_ids=step.positions_T[None], use_cache=False, step=step
    ).last_hidden_state[0]
    logits: Tensor = model.lm_head(hidden).float()
    return logits


def by_fused(decoder: FusedDecoder, step: Step) -> Tensor:
    _, hidden = decoder.forward(
        step.ids_T, step.positions_T, step.slots_T, step.attend, step.pool, ()
    )
    return decoder.logits(hidden)


VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {"overlap": False},
    "fused, 64 rows": {"overlap": False, "few_rows": 64},
    "overlap": {"overlap": True},
    "overlap, 64 rows": {"overlap": True, "few_rows": 64},
    "overlap, ahead 16": {"overlap": True, "ahead_bytes": 16 << 20},
    "overlap, ahead 32": {"overlap": True, "ahead_bytes": 32 << 20},
}
STEPS = ((1, 1, 1024), (1, 5, 1024), (1, 1, 2048), (32, 1, 1024), (32, 1, 2048))


def _skips(variant: dict[str, Any], num_rows: int) -> bool:
    """More rows a kernel change nothing up to 16; fetching ahead is for an idle attention."""
    if variant.get("overlap") and not can_overlap(torch.device("cuda")):
        return True
    return num_rows <= 16 if "few_rows" in variant else "ahead_bytes" in variant and num_rows > 16


def rows(models: list[str], variants: list[str], hugging_face: bool) -> list[dict[str, Any]]:
    """One row for each model and step; times in milliseconds."""
    bandwidth = copy_bytes_per_s()
    found = []
    for name in models:
        config = SHAPES[name]()
        torch.manual_seed(0)
        model = random_model(config)
        for shape in STEPS:
            step = make_step(config, *shape)
            row = _row(name, config, model, step, variants, hugging_face, bandwidth)
            found.append(row)
            print(_line(row), flush=True)
            del step
        del model
        torch.cuda.empty_cache()
    return found


def _row(
    name: str, config: Any, model: Any, step: Step, variants: list[str], hugging_face: bool,
    bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {
        "model": name,
        "batch": step.batch,
        "num_query": step.num_query,
        "context": step.context,
        "floor_ms": floor_bytes(config, model, step.batch * step.context) / bandwidth * 1e3,
    }
    want = by_hugging_face(model, step)
    if hugging_face:
        row["hugging_face_ms"] = _graphed_ms(lambda: by_hugging_face(model, step))
    times, errors = {}, {}
    for variant in variants:
        options = VARIANTS[variant]
        if _skips(options, step.batch * step.num_query):
            continue
        decoder = FusedDecoder(model, **options)
        got = by_fused(decoder, step)
        errors[variant] = ((got - want).norm() / want.norm()).item()
        times[variant] = _graphed_ms(lambda d=decoder: by_fused(d, step))  # type: ignore[misc]
    row["fused_ms"], row["difference_from_hugging_face"] = times, errors
    best = min(times, key=lambda variant: times[variant])
    row["best"], row["share_of_floor"] = best, row["floor_ms"] / times[best]
    return row


def _graphed_ms(work: Callable[[], object]) -> float:
    return graphed(work, calls=1).median_ms


def _line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {ms:.3f}" for name, ms in row["fused_ms"].items())
    other = f"{row['hugging_face_ms']:.2f}" if "hugging_face_ms" in row else "-"
    worst = max(row["difference_from_hugging_face"].values())
    return (
        f"{row['model']:>12} batch {row['batch']:>2} rows {row['num_query']} "
        f"context {row['context']}: floor {row['floor_ms']:.3f}, Hugging Face {other}, "
        f"{times} ms; {row['share_of_floor']:.0%} of the floor by {row['best']}; "
        f"differs by {worst:.4f}"
    )


def main(
    out: Annotated[Path, typer.Option(help="result file")] = Path(
        "benchmarks/results/ops_decoder.json"
    ),
    models: Annotated[str, typer.Option(help="names by commas, or all")] = "Qwen3-0.6B,Qwen3-8B",
    variants: Annotated[str, typer.Option(help="names by semicolons, or all")] = "all",
    hugging_face: Annotated[bool, typer.Option(help="time Hugging Face's forward")] = True,
) -> None:
    """Milliseconds of one step in a CUDA graph."""
    chosen_models = list(LARGE) if models == "all" else models.split(",")
    chosen = list(VARIANTS) if variants == "all" else variants.split(";")
    with torch.inference_mode():
        found = rows(chosen_models, chosen, hugging_face)
    write_result(out, {"rows": found})


if __name__ == "__main__":
    typer.run(main)
