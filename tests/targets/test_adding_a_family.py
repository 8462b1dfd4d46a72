"""A target family is one new file and one line in the catalog."""

from __future__ import annotations

import json

from oracles.one_line import run_in, with_addition

SMOLLM3 = '''
"""The SmolLM3 family: Llama's layers, unless some of them do not rotate queries and keys."""

from dataclasses import replace

from transformers.models.smollm3 import modeling_smollm3

from targets.layers import llama_like

LIKE_LLAMA = llama_like(modeling_smollm3, "SmolLM3")


def why_not(model):
    unrotated = model.config.no_rope_layers.count(0)
    reason = f"{unrotated} layers do not rotate queries and keys"
    return reason if unrotated else LIKE_LLAMA.why_not(model)


FAMILY = replace(LIKE_LLAMA, why_not=why_not)
'''

USE_IT = """
import json
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM
from targets.fused import supports
from targets.target import Target
from specops.attention import DecodePass, decode_slots

SHAPE = dict(
    vocab_size=90, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
torch.manual_seed(0)
model = SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layers=[1, 1])).requires_grad_(False)
unrotated = SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]))
ids = torch.tensor([[3, 1, 4, 1, 5]])
want = model(input_ids=ids, use_cache=False).logits[0]

target = Target(model, ())
refused = target.fuse(num_positions=64)
at = DecodePass(torch.tensor([[1, 2]]).int(), torch.tensor([0]).int(), 4)
rows = target.decode(
    ids[0], at.positions(5).flatten(), decode_slots(at, 5), at, target.make_pool(12)
)
norm = model.model.norm
print(json.dumps({
    "refused": refused,
    "is_fused": target.is_fused,
    "error": ((target.logits(rows.hidden_TH) - want).norm() / want.norm()).item(),
    "norms_are_fused": "forward" in vars(norm),
    "unrotated": supports(unrotated),
}))
"""


def test_a_family_is_one_file_and_one_line(tmp_path):
    """A SmolLM3 model runs our decoder, which computes what Hugging Face does, and its norms are
    one operation each; a SmolLM3 model that the family's check refuses does not."""
    root = with_addition(
        tmp_path,
        "targets/smollm3.py",
        SMOLLM3,
        "targets/families.py",
        '    "SmolLM3ForCausalLM": "targets.smollm3:FAMILY",',
        after='"LlamaForCausalLM":',
    )

    done = run_in(root, USE_IT)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("error") < 1e-5
    assert found == {
        "refused": None,
        "is_fused": True,
        "norms_are_fused": True,
        "unrotated": "1 layers do not rotate queries and keys",
    }
