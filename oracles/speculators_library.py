"""Whether vLLM's ``speculators`` computes our drafters' logits from what we export.

Run where both that package and this repository can be imported; it is no dependency, because it
brings datasets, torchvision and torchaudio along::

    python -m oracles.speculators_library

For each variant of EAGLE-3 it makes a small target and drafter, exports the drafter, loads it with
``SpeculatorModel.from_pretrained``, and compares the logits of all chains of three tokens with
those of ``reference_chain_logits``. Then it lets the library save what it loaded, imports that, and
compares the tensors. Exit code 1 if anything differs.
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
from transformers import LlamaConfig, LlamaForCausalLM

from buffer.fingerprint import target_fingerprint
from buffer.manifest import TENSORS
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.training import reference_chain_logits
from drafters.formats.published import export, imported, load_target_table
from oracles.bundle_folders import write_bundle

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the library would compile its forward pass
LENGTH, NUM_STEPS, VOCAB, REDUCED = 20, 3, 96, 40
VARIANTS = ("norm_before_residual", "fc_norm", "norm_output")
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


def make_drafter(target: Any, variants: tuple[str, ...], is_reduced: bool) -> Eagle3:
    config = config_for_target(target.config, (1, 3, 5), REDUCED if is_reduced else None)
    drafter = Eagle3(Eagle3Config.from_json(config.to_json() | dict.fromkeys(variants, True)))
    drafter.initialise(3)
    for parameter in drafter.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 8
        else:
            parameter.data *= 5
    if drafter.d2t is not None:
        drafter.d2t.copy_(2 * torch.arange(REDUCED) - torch.arange(REDUCED))
    return drafter.requires_grad_(False)


@torch.no_grad()
def library_logits(folder: Path, ids_S: Tensor, features_SF: Tensor) -> tuple[Any, Tensor]:
    """The library's model, and its logits [K, S - 1, Vd] of the rows that begin at token 1."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config).eval()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out[0].clone()))
    rows = len(ids_S) - 1
    model(
        hidden_states=features_SF[None, :-1],
        input_ids=ids_S[None, 1:],
        document_ids=torch.zeros(1, rows, dtype=torch.long),
        ttt_steps=NUM_STEPS,
    )
    return model, torch.stack(seen)


def compare(home: Path, variants: tuple[str, ...], is_reduced: bool) -> tuple[float, bool]:
    """Largest difference of a logit, and whether the tensors survive the library."""
    target = make_target(home / "target")
    drafter = make_drafter(target, variants, is_reduced)
    fingerprint = target_fingerprint(home / "target")
    bundle = write_bundle(
        home / "0", "eagle3", drafter.config.to_json(), fingerprint, drafter.bundle_tensors()
    )
    table = load_target_table(str(home / "target"), home / "target")
    export(bundle, "speculators", table, home / "out")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    features = torch.randn(LENGTH, 3 * 32, generator=generator)
    model, theirs = library_logits(home / "out", ids, features)
    embed = target.get_input_embeddings().weight.detach()
    known = torch.ones(LENGTH, dtype=torch.bool)
    worst = 0.0
    for anchor in range(1, LENGTH - NUM_STEPS):
        ours = reference_chain_logits(drafter, embed, ids, features, known, anchor, NUM_STEPS)
        worst = max(worst, float((ours - theirs[:, anchor - 1]).abs().max()))
    model.save_pretrained(home / "again")
    _, files = imported(home / "again", table)
    back, sent = load(files[TENSORS]), load(bundle.files[TENSORS])
    same = back.keys() == sent.keys() and all(torch.equal(back[n], sent[n]) for n in sent)
    return worst, same


def main() -> int:
    failures = 0
    chosen = [*((name,) for name in VARIANTS), (), VARIANTS, ("fc_norm", "norm_output")]
    for variants, is_reduced in itertools.product(chosen, (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            worst, same = compare(Path(folder), variants, is_reduced)
        failures += worst > TOLERANCE or not same
        size = "reduced" if is_reduced else "whole"
        print(f"{size:8} {', '.join(variants) or 'plain':45} {worst:.1e}  tensors back: {same}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
