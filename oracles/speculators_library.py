"""Whether vLLM's ``speculators`` computes our drafters' logits from what we export.

Run where both that package and this repository can be imported; it is no dependency, because it
brings datasets, torchvision and torchaudio along::

    python -m oracles.speculators_library

For each variant of EAGLE-3 and P-EAGLE it makes a small target and drafter, exports the drafter,
loads it with ``SpeculatorModel.from_pretrained``, and compares the logits of all chains of three
tokens with ours: those of ``reference_chain_logits`` and of ``parallel_outputs``. Then it lets the
library save what it loaded, imports that, and compares the tensors. Exit code 1 if anything
differs. Where the package is installed, ``tests/drafters/formats/test_speculators_library.py`` does
the same.
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
from drafters.batch import from_sequences
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.training import reference_chain_logits
from drafters.formats.published import export, imported, load_target_table
from drafters.p_eagle import PEagle, PEagleConfig
from drafters.p_eagle_learning import parallel_outputs
from drafters.trainable import trainable
from oracles.bundle_folders import write_bundle

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the library would compile its forward pass
LENGTH, NUM_STEPS, VOCAB, REDUCED = 20, 3, 96, 40
VARIANTS = ("norm_before_residual", "fc_norm", "norm_output")
CASES = (
    *(("eagle3", one) for one in (*((name,) for name in VARIANTS), (), VARIANTS, VARIANTS[1:])),
    *(("p_eagle", one) for one in ((), VARIANTS[:1], VARIANTS[:2])),
)
"""Kind and variants; each with a whole and a reduced vocabulary."""
MASK_ID = 90
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


def make_drafter(kind: str, target: Any, variants: tuple[str, ...], is_reduced: bool) -> Eagle3:
    given = config_for_target(target.config, (1, 3, 5), REDUCED if is_reduced else None)
    config = Eagle3Config.from_json(given.to_json() | dict.fromkeys(variants, True))
    drafter = Eagle3(config) if kind == "eagle3" else PEagle(PEagleConfig(config, 3, MASK_ID))
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
    """The library's model, and its logits [K, S - 1, Vd] of the chains that begin at each row."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config).eval()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out[0].clone()))
    rows = len(ids_S) - 1
    inputs = {
        "hidden_states": features_SF[None, :-1],
        "input_ids": ids_S[None, 1:],
        "document_ids": torch.zeros(1, rows, dtype=torch.long),
    }
    if config.speculators_model_type == "eagle3":
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


@torch.no_grad()
def our_logits(drafter: Eagle3, embed: Tensor, ids_S: Tensor, features_SF: Tensor) -> Tensor:
    """[K, S - 1, Vd] logits of the chains whose anchors are at positions 1, 2, ... S - 1."""
    known = torch.ones(len(ids_S), dtype=torch.bool)
    last = len(ids_S) - NUM_STEPS
    if not isinstance(drafter, PEagle):
        chains = [
            reference_chain_logits(drafter, embed, ids_S, features_SF, known, anchor, NUM_STEPS)
            for anchor in range(1, last)
        ]
        return torch.stack(chains, 1)
    batch = from_sequences(
        ids_S[None], torch.arange(len(ids_S))[None], features_SF[None],
        torch.zeros(1, len(ids_S), 32), known[None], known[None],
    )  # fmt: skip
    anchors = torch.arange(1, last)
    first, *deeper = parallel_outputs(drafter, embed, batch, anchors, NUM_STEPS)
    return torch.stack([drafter.logits(rows) for rows in (first[anchors], *deeper)])


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
    features = torch.randn(LENGTH, 3 * 32, generator=generator)
    model, theirs = library_logits(home / "out", ids, features)
    ours = our_logits(drafter, target.get_input_embeddings().weight.detach(), ids, features)
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
        with tempfile.TemporaryDirectory() as folder:
            worst, same = compare(Path(folder), kind, variants, is_reduced)
        failures += worst > TOLERANCE or not same
        size = "reduced" if is_reduced else "whole"
        name = f"{kind} {', '.join(variants) or 'plain'}"
        print(f"{size:8} {name:52} {worst:.1e}  tensors back: {same}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
