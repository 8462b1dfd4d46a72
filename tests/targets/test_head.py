"""The two tensors that the trainer reads reproduce the target's logits and embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from targets.head import _by_its_code, load_target_head, tensor_files
from tests.trainer.traffic import SHAPE, save_target

CPU = torch.device("cpu")


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

    head = load_target_head(tmp_path, CPU, torch.float32)

    with torch.no_grad():
        seen = model(ids, output_hidden_states=True)
        torch.testing.assert_close(head.embed_VH[ids], model.get_input_embeddings()(ids))
        torch.testing.assert_close(head.lm_head.logits(seen.hidden_states[-1][0]), seen.logits[0])


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_of_a_usual_target_is_read_without_its_modelling_code(
    tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_target(tmp_path, tie=tie)
    by_code = _by_its_code(tensor_files(tmp_path), tmp_path, CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "transformers", None)  # whoever imports it gets an error

    head = load_target_head(tmp_path, CPU, torch.float32)

    assert head.embed_VH.equal(by_code.embed_VH)
    assert head.lm_head.weight_VH.equal(by_code.lm_head.weight_VH)
    assert (head.lm_head.weight_VH is head.embed_VH) == tie
    assert head.embed_scale == by_code.embed_scale
    for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "rope_parameters"):
        assert getattr(head.config, name) == getattr(by_code.config, name), name


def test_a_pickled_target_is_refused(tmp_path: Path) -> None:
    save_target(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"no \*\.safetensors weights; pickle files are not"):
        load_target_head(tmp_path, CPU, torch.float32)
