"""MTP heads are trained and published by the same trainer."""

from __future__ import annotations

import json

import torch

from buffer.folder_weights import FolderWeights
from configs.schema import DrafterSettings
from tests.trainer.traffic import (
    LAYERS,
    VOCAB,
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
    train,
    write_traces,
)


def test_heads_of_few_tokens_learn_and_are_published(tmp_path):
    target = tmp_path / "target"
    model = save_target(target)
    traces = make_traces(model, fingerprint_of(target), 48, layer_ids=(LAYERS,))
    run_dir = tmp_path / "run"
    write_traces(run_dir, traces)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(0, VOCAB, 2))))
    drafter = DrafterSettings.model_validate({"kind": "mtp", "draft_vocab": str(ids)})
    settings = settings_for(run_dir, target, max_steps=25, gate_share=0.0)

    train(settings.model_copy(update={"drafter": drafter}))

    store = FolderWeights(run_dir / "weights")
    newest = store.read(max(store.versions())).manifest
    assert newest.version >= 1 and newest.kind == "mtp"
    assert newest.drafter_config["layer_ids"] == [LAYERS]
    assert newest.drafter_config["draft_vocab_size"] == VOCAB // 2
    tensors = [load_of(store, version) for version in (0, newest.version)]
    assert not tensors[0]["proj.weight"].equal(tensors[1]["proj.weight"])
    assert tensors[1]["d2t"].equal(torch.arange(VOCAB // 2))
    assert not any("lm_head" in name or "embed_tokens" in name for name in tensors[1])


def load_of(store, version):
    from safetensors.torch import load

    return load(store.read(version).files["drafter.safetensors"])
