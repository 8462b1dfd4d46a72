"""The two tensors that a trainer reads yield the logits and embeddings of the whole target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from targets.head import load_target_head
from tests.trainer.traffic import SHAPE, save_target


def save_gemma(folder: Path) -> Any:
    config = Gemma2Config(**SHAPE, query_pre_attn_scalar=8, final_logit_softcapping=3.0)
    model = Gemma2ForCausalLM(config).float().eval()
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(save_target, id="tied"),
        pytest.param(lambda folder: save_target(folder, tie=False), id="untied"),
        pytest.param(save_gemma, id="scaled embeddings and softcap"),
    ],
)
def test_logits_and_embeddings_are_the_targets(save, tmp_path):  # type: ignore[no-untyped-def]
    model = save(tmp_path)
    ids = torch.arange(0, 96, 5)[None]

    head = load_target_head(tmp_path, torch.device("cpu"), torch.float32)

    with torch.no_grad():
        seen = model(ids, output_hidden_states=True)
        torch.testing.assert_close(head.embed_VH[ids], model.get_input_embeddings()(ids))
        torch.testing.assert_close(head.lm_head.logits(seen.hidden_states[-1][0]), seen.logits[0])


def test_a_pickled_target_is_refused(tmp_path: Path) -> None:
    save_target(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"no \*\.safetensors weights; pickle files are not"):
        load_target_head(tmp_path, torch.device("cpu"), torch.float32)
