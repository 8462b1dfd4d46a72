"""Launches that one draft costs, by kind of drafter: with its module's own code, and fused.

    python -m benchmarks.ops.launches               # SmolLM2-135M, 1 and 32 requests; no GPU needed

Counted is what a round adds to plain decoding: the rows of the tokens that the last round verified
(``observe``), and four greedy draft tokens (``propose``), as they are captured in a CUDA graph. A
launch takes 2.5 microseconds and more on an H200, so a small target's draft is as fast as they
are few. Shapes are those of new drafters, with weights where a server's swaps put them.

Writes ``ops_launches.json`` and ``rows/launches.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.harness.launches import counted
from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from benchmarks.harness.shapes import SHAPES
from configs.schema import DrafterSettings
from drafters.catalog import CATALOG, kind_of
from drafters.protocol import DrafterContext, Weights
from drafters.trainable import trainable
from serving.engine.drafts import Best
from specops.attention import DecodePass
from targets.target import Target

NUM_DRAFT = 4
_PAGE, _PAGES_EACH = 16, 64
_META = torch.device("meta")
_KINDS = [kind for kind, entry in CATALOG.items() if entry.trainable]


def lay_out(module: nn.Module) -> None:
    """Put all parameters behind each other in one memory, as swaps have them."""
    parameters = list(module.parameters())
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=_META)
    at = 0
    for parameter in parameters:
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()


def made(target: Target, weights: Weights, kind: str) -> Any:
    """The drafter as a server makes it, on the meta device."""
    is_model = CATALOG[kind].is_model
    context = DrafterContext(
        settings=DrafterSettings(kind=kind),
        embed=target.embed,
        lm_head=target.lm_head,
        hidden_size=target.config.hidden_size,
        vocab_size=target.vocab_size,
        num_slots=_PAGE * _PAGES_EACH,
        logits=partial(target.logits, widen=False),
        device=torch.device("cpu") if is_model else _META,
        dtype=torch.bfloat16,
        weights=weights,
    )
    drafter: Any = kind_of(kind).build(context)
    if is_model:  # Hugging Face's loading reads values
        drafter = type(drafter)(drafter.module.to_empty(device=_META), context.num_slots)
    lay_out(drafter.module)
    return drafter


def first_weights(kind: str, config: PretrainedConfig) -> Weights:
    """Those of a new drafter."""
    learns = trainable(kind)
    head = torch.zeros(config.vocab_size, config.hidden_size)
    model = learns.new_model(config, head, None, 0)
    return Weights(0, learns.config_to_json(model), learns.bundle_tensors(model))


def draft_launches(
    target: Target, weights: Weights, kind: str, num_requests: int, *, fused: bool
) -> dict[str, Counter[str]]:
    """Launches of each half of a draft, within ``counted``."""
    drafter = made(target, weights, kind)
    if fused and (reason := drafter.fuse(_PAGE * _PAGES_EACH)):
        raise ValueError(f"{kind} is not fused: {reason}")
    with torch.device(_META):
        pages = torch.empty(num_requests, _PAGES_EACH, dtype=torch.int32)
        at = DecodePass(pages, torch.empty(num_requests, dtype=torch.int32), _PAGE, first_key=1)
        ids_T = torch.empty(num_requests * (NUM_DRAFT + 1), dtype=torch.int64)
        shape = (len(ids_T), len(drafter.layer_ids), target.config.hidden_size)
        features = torch.empty(shape, dtype=torch.bfloat16)
        outputs = torch.empty(num_requests, drafter.output_size, dtype=torch.bfloat16)
    choose = Best(None if drafter.vocab is None else drafter.vocab.d2t_D)
    with counted() as found:
        drafter.observe(ids_T, features, at)
        observed = Counter(found)
        drafter.propose(outputs, at, NUM_DRAFT, choose)
    return {"observe": observed, "propose": found - observed}


def lines(shape: str, sizes: tuple[int, ...], kinds: list[str]) -> Iterator[dict[str, Any]]:
    """One for each drafter and number of requests."""
    config = SHAPES[shape]()
    with _META:
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        target = Target(model.bfloat16(), ())
    with counted():
        target.fuse(_PAGE * _PAGES_EACH)
    for kind in kinds:
        weights = first_weights(kind, config)
        for size in sizes:
            line: dict[str, Any] = {"kind": kind, "requests": size}
            for name, fused in (("own", False), ("fused", True)):
                with counted():
                    found = draft_launches(target, weights, kind, size, fused=fused)
                line[name] = sum(counts.total() for counts in found.values())
                line[f"{name}_by_kernel"] = {k: dict(c.most_common()) for k, c in found.items()}
            yield line


def main(
    out: Out = RESULTS / "ops_launches.json",
    shape: str = "SmolLM2-135M",
    requests: str = "1,32",
) -> None:
    """Count, print and write."""
    found = []
    for line in lines(shape, tuple(int(size) for size in requests.split(",")), _KINDS):
        found.append(line)
        print({name: line[name] for name in ("kind", "requests", "own", "fused")}, flush=True)
    write_result(out, {"shape": shape, "draft_k": NUM_DRAFT, "lines": found})
    rows = [
        Row(f"{shape}, {one['kind']}, {one['requests']} requests, K = {NUM_DRAFT}",
            f"launches of a draft, {name}", one[name], None, None)
        for one in found for name in ("own", "fused")
    ]  # fmt: skip
    write_rows("launches", rows, "python -m benchmarks.ops.launches")


if __name__ == "__main__":
    typer.run(main)
