"""Whether vLLM's ``speculators`` computes our drafters' logits from what we export.

Run where both that package and this repository can be imported; it is no dependency, because it
brings datasets, torchvision and torchaudio along::

    python -m oracles.speculators_library

For each variant of each drafter that the library has it makes a small target and drafter, exports
the drafter, loads it with ``SpeculatorModel.from_pretrained``, and compares logits with ours: of
EAGLE-3 and P-EAGLE those of all chains of three tokens (``reference_chain_logits`` and
``parallel_outputs``), of DFlash those of all blocks (``block_hidden``), of MTP heads those of three
steps. Then it lets the library save what it loaded, imports that, and compares the tensors. Exit
code 1 if anything differs. Where the package is installed,
``tests/drafters/formats/test_speculators_library.py`` does the same.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from buffer.fingerprint import target_fingerprint
from buffer.manifest import TENSORS
from drafters.batch import TrainingBatch, from_sequences
from drafters.dflash.model import DFlash, DFlashConfig
from drafters.dflash.trainable import block_hidden
from drafters.dflash.trainable import config_for_target as dflash_config
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.training import reference_chain_logits
from drafters.formats.published import export, imported, load_target_table
from drafters.mtp import Mtp, MtpConfig
from drafters.mtp import config_for_target as mtp_config
from drafters.p_eagle import PEagle, PEagleConfig
from drafters.p_eagle_learning import parallel_outputs
from drafters.trainable import trainable
from oracles.bundle_folders import write_bundle
from specops.distill import FrozenHead
from targets.head import TargetHead

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the library would compile its forward pass
LENGTH, NUM_STEPS, VOCAB, REDUCED = 20, 3, 96, 40
VARIANTS = ("norm_before_residual", "fc_norm", "norm_output")
CASES = (
    *(("eagle3", one) for one in (*((name,) for name in VARIANTS), (), VARIANTS, VARIANTS[1:])),
    *(("p_eagle", one) for one in ((), VARIANTS[:1], VARIANTS[:2])),
    *(("dflash", one) for one in ((), ("window",), ("window", "both_ways"))),
    *(("mtp", one) for one in ((), ("gate",))),
)
"""Kind and variants."""
REDUCIBLE = ("eagle3", "p_eagle")
"""Kinds whose vocabulary may be reduced."""
MASK_ID, BLOCK, WINDOW = 90, 4, 64
"""The window is wider than the text: the library counts it from the anchor, not from each row."""
TOLERANCE = 1e-4


def make_target(folder: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def make_drafter(kind: str, target: Any, variants: tuple[str, ...], is_reduced: bool) -> Any:
    drafter = _new(kind, target, variants, is_reduced)
    drafter.initialise(3)
    for parameter in drafter.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 8
        else:
            parameter.data *= 1 if kind == "dflash" else 5
    if kind == "mtp":  # the library has no place for a copy of its own
        drafter.target_norm.load_state_dict(target.model.norm.state_dict())
    if is_reduced:
        drafter.d2t.copy_(2 * torch.arange(REDUCED) - torch.arange(REDUCED))
    return drafter.requires_grad_(False)


def _new(kind: str, target: Any, variants: tuple[str, ...], is_reduced: bool) -> Any:
    if kind == "dflash":
        made = dflash_config(target.config, (1, 3, 6), BLOCK).to_json()
        windows = (WINDOW, None) if "window" in variants else (None, None)
        causal = (windows[0] is not None and "both_ways" not in variants, False)
        masks = {"windows": windows, "causal": causal, "mask_token_id": MASK_ID}
        return DFlash(DFlashConfig.from_json({**made, **masks}))
    if kind == "mtp":
        made = mtp_config(target.config).to_json()
        gated = {"order": "qwen3_5", "has_output_gate": True, "rotary_dim": 4}
        more = {"has_head_norms": True, **(gated if "gate" in variants else {})}
        return Mtp(MtpConfig.from_json({**made, **more}))
    given = config_for_target(target.config, (1, 3, 5), REDUCED if is_reduced else None)
    config = Eagle3Config.from_json(given.to_json() | dict.fromkeys(variants, True))
    return Eagle3(config) if kind == "eagle3" else PEagle(PEagleConfig(config, 3, MASK_ID))


@torch.no_grad()
def library_logits(folder: Path, ids_S: Tensor, features_SF: Tensor) -> tuple[Any, Tensor]:
    """The library's model, and its logits [K, N, Vd] as ``our_logits`` has them."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config).eval()
    kind = config.speculators_model_type
    if kind == "dflash":
        return model, _block_logits(model, ids_S, features_SF)
    if kind == "mtp":
        return model, torch.cat(model(ids_S[None], features_SF[None])[0])
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out[0].clone()))
    rows = len(ids_S) - 1
    inputs = {
        "hidden_states": features_SF[None, :-1],
        "input_ids": ids_S[None, 1:],
        "document_ids": torch.zeros(1, rows, dtype=torch.long),
    }
    if kind == "eagle3":
        model(**inputs, ttt_steps=NUM_STEPS)
        return model, torch.stack(seen)
    return model, _parallel_logits(model, inputs, rows, seen)


def _parallel_logits(
    model: Any, inputs: dict[str, Tensor], rows: int, seen: list[Tensor]
) -> Tensor:
    """P-EAGLE's; NaN where the library, which draws the chains to train, has left out a depth."""
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle.data import generate_cod_sample_indices

    whole = {"num_depths": NUM_STEPS, "down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0}
    torch.manual_seed(0)
    model(
        **inputs, **whole, loss_config=resolve_loss_config("kl_div", "eager"),
        verifier_last_hidden_states=torch.zeros(1, rows, 32),
    )  # fmt: skip
    torch.manual_seed(0)
    anchor, depth = generate_cod_sample_indices(rows, torch.ones(1, rows), **whole)
    logits = seen[0].new_full((NUM_STEPS, rows, seen[0].shape[-1]), torch.nan)
    is_row = anchor >= 0
    logits[depth[is_row], anchor[is_row]] = seen[0][is_row]
    return logits


def _block_logits(model: Any, ids_S: Tensor, features_SF: Tensor) -> Tensor:
    """DFlash's, of the blocks whose anchors are at positions 1, 2, ... S - ``BLOCK`` - 1."""
    is_anchor = torch.ones(1, len(ids_S))
    is_anchor[:, 0] = 0
    _, logits, _, _, rows = model._backbone_forward(
        features_SF[None], ids_S[None], is_anchor, torch.zeros(1, len(ids_S), 32),
        torch.zeros(1, len(ids_S), dtype=torch.long), max_anchors=len(ids_S) - BLOCK - 1,
    )  # fmt: skip
    blocks = logits[0].view(-1, BLOCK, logits.shape[-1])
    in_order = rows.view(-1, BLOCK)[:, 0].argsort()
    return blocks[in_order, 1:].transpose(0, 1)


@torch.no_grad()
def our_logits(drafter: Any, target: Any, ids_S: Tensor, features_SF: Tensor) -> Tensor:
    """[K, N, Vd] logits of the chains or blocks whose anchors are at positions 1, 2, ... N."""
    embed = target.get_input_embeddings().weight.detach()
    head_VH = target.get_output_embeddings().weight.detach()
    if isinstance(drafter, Mtp):
        return _step_hidden(drafter, embed, ids_S, features_SF) @ head_VH.T
    known = torch.ones(len(ids_S), dtype=torch.bool)
    if isinstance(drafter, DFlash):
        head = TargetHead(target.config, embed, FrozenHead(head_VH))
        anchors = torch.arange(len(ids_S) - BLOCK - 1)
        batch = _batch_of(ids_S, features_SF)
        hidden = block_hidden(drafter, head, batch, anchors, BLOCK - 1, None)
        return (hidden @ head_VH.T).view(len(anchors), BLOCK - 1, -1).transpose(0, 1)
    last = len(ids_S) - NUM_STEPS
    if not isinstance(drafter, PEagle):
        chains = [
            reference_chain_logits(drafter, embed, ids_S, features_SF, known, anchor, NUM_STEPS)
            for anchor in range(1, last)
        ]
        return torch.stack(chains, 1)
    batch = _batch_of(ids_S, features_SF)
    anchors = torch.arange(1, last)
    first, *deeper = parallel_outputs(drafter, embed, batch, anchors, NUM_STEPS)
    return torch.stack([drafter.logits(rows) for rows in (first[anchors], *deeper)])


def _batch_of(ids_S: Tensor, features_SF: Tensor) -> TrainingBatch:
    """The text as one piece; rows with a loss begin at position 1."""
    known = torch.ones(1, len(ids_S), dtype=torch.bool)
    return from_sequences(
        ids_S[None], torch.arange(len(ids_S))[None], features_SF[None],
        torch.zeros(1, len(ids_S), 32), known, known,
    )  # fmt: skip


def _step_hidden(drafter: Mtp, embed: Tensor, ids_S: Tensor, hidden_SH: Tensor) -> Tensor:
    """[K, N, H] outputs of a head as the library trains it: from the second step on, each row reads
    its own output of the step before, and sees the rows of its own step up to itself. A server lets
    it see the rows of committed tokens instead."""
    num_rows = len(ids_S) - NUM_STEPS - 1
    rope = drafter.rope(torch.arange(num_rows))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed[0].transpose(0, 1)

    hidden, outputs = hidden_SH[:num_rows], []
    for step in range(1, NUM_STEPS + 1):
        hidden = drafter(embed[ids_S[step : step + num_rows]], hidden, *rope, attend)
        outputs.append(hidden)
    return torch.stack(outputs)


def compare(
    home: Path, kind: str, variants: tuple[str, ...], is_reduced: bool
) -> tuple[float, bool]:
    """Largest difference of a logit, and whether the tensors survive the library."""
    target = make_target(home / "target")
    drafter = make_drafter(kind, target, variants, is_reduced)
    fingerprint = target_fingerprint(home / "target")
    learns = trainable(kind)
    bundle = write_bundle(
        home / "0", kind, learns.config_to_json(drafter), fingerprint,
        learns.bundle_tensors(drafter),
    )  # fmt: skip
    table = load_target_table(str(home / "target"), home / "target")
    export(bundle, "speculators", table, home / "out")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    width = 32 if kind == "mtp" else 3 * 32
    features = torch.randn(LENGTH, width, generator=generator)
    model, theirs = library_logits(home / "out", ids, features)
    ours = our_logits(drafter, target, ids, features)
    difference = (ours - theirs[:, : ours.shape[1]]).abs()
    compared = difference[~difference.isnan()]
    assert len(compared) > 0.8 * difference.numel(), "most chains are whole"
    worst = float(compared.max())
    model.save_pretrained(home / "again")
    _, files = imported(home / "again", table)
    back, sent = load(files[TENSORS]), load(bundle.files[TENSORS])
    same = back.keys() == sent.keys() and all(torch.equal(back[n], sent[n]) for n in sent)
    return worst, same


def main() -> int:
    failures = 0
    for (kind, variants), is_reduced in itertools.product(CASES, (False, True)):
        if is_reduced and kind not in REDUCIBLE:
            continue
        with tempfile.TemporaryDirectory() as folder:
            worst, same = compare(Path(folder), kind, variants, is_reduced)
        failures += worst > TOLERANCE or not same
        size = "reduced" if is_reduced else "whole"
        name = f"{kind} {', '.join(variants) or 'plain'}"
        print(f"{size:8} {name:52} {worst:.1e}  tensors back: {same}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
