"""New weights take the place of a running target's: all of them and where they lie, or none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from buffer.fingerprint import target_fingerprint
from oracles.engines import ARCHITECTURES, random_model
from specops.attention import DecodePass
from targets.target import Target
from targets.update import TargetWeights

PAGE, LENGTH = 4, 12


def model_of(architecture, seed):
    """A random model whose norms and biases matter, too."""
    model = random_model(architecture, seed=seed, head_dim=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) / 4
    return model


def target_of(architecture, seed, fused):
    target = Target(model_of(architecture, seed), (1, 3))
    if fused:
        assert target.fuse(64) is None
    return target


@torch.no_grad()
def computed(target):
    """Hidden rows, tapped rows and logits of one text."""
    ids = torch.arange(LENGTH) * 7 % target.vocab_size
    pages = torch.arange(1, LENGTH // PAGE + 1, dtype=torch.int32)[None]
    slots = torch.arange(LENGTH) + PAGE
    at = DecodePass(pages, torch.zeros(1, dtype=torch.int32), PAGE)
    pool = target.make_pool(LENGTH + PAGE)
    rows = target.decode(ids, torch.arange(LENGTH), slots, at, pool)
    return torch.cat((rows.features_TmH.flatten(), rows.hidden_TH.flatten(),
                      target.logits(rows.hidden_TH).flatten()))  # fmt: skip


def addresses(target):
    return {name: p.data_ptr() for name, p in target.model.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_an_update_the_target_computes_what_a_fresh_one_does(architecture, fused, tmp_path):
    running, fresh = (target_of(architecture, seed, fused) for seed in (0, 1))
    model_of(architecture, 1).save_pretrained(tmp_path)
    before, where = computed(running), addresses(running)
    weights = TargetWeights(running)

    fingerprint = weights.read(tmp_path)
    assert torch.equal(computed(running), before)
    assert not weights.are_in_force()
    weights.take_over()

    assert fingerprint == target_fingerprint(tmp_path)
    assert weights.are_in_force()
    assert addresses(running) == where
    assert torch.equal(computed(running), computed(fresh))


def test_an_update_may_be_followed_by_others_and_by_the_first_weights(tmp_path):
    running = target_of("qwen3", 0, fused=True)
    wanted = {}
    weights = TargetWeights(running)
    for seed in (1, 2, 0):
        model_of("qwen3", seed).save_pretrained(tmp_path / str(seed))
        wanted[seed] = computed(target_of("qwen3", seed, fused=True))
    for seed in (1, 2, 1, 0):
        weights.read(tmp_path / str(seed))
        weights.take_over()
        assert torch.equal(computed(running), wanted[seed])


def test_weights_of_another_dtype_are_cast_as_at_the_start(tmp_path):
    running, new = target_of("llama", 0, fused=True), model_of("llama", 1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(parameter.bfloat16())
    tensors = {name: t.bfloat16().clone() for name, t in new.state_dict().items()}
    new.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    weights = TargetWeights(running)
    weights.read(tmp_path)
    weights.take_over()

    fresh = Target(new, (1, 3))
    assert fresh.fuse(64) is None
    assert torch.equal(computed(running), computed(fresh))


def tied_model(seed):
    model = model_of("qwen3", seed)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def test_a_checkpoint_of_a_tied_target_may_hold_the_head_as_well(tmp_path):
    running, new = Target(tied_model(0), (1, 3)), tied_model(1)
    new.save_pretrained(tmp_path)
    head = new.lm_head.weight.detach().clone()
    changed(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    weights = TargetWeights(running)
    weights.read(tmp_path)
    weights.take_over()
    assert torch.equal(computed(running), computed(Target(new, (1, 3))))


def changed(folder, change):
    """Rewrite the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def lacks_one(folder):
    changed(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def has_one_more(folder):
    changed(folder, lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}))


def has_another_shape(folder):
    changed(folder, lambda t: t.update({"model.norm.weight": torch.zeros(50)}))


def has_nan(folder):
    def poison(tensors):
        tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] = torch.nan

    changed(folder, poison)


def has_integers(folder):
    changed(folder, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int32)}))


def overflows(folder):
    def grow(tensors):
        tensors["model.norm.weight"] = torch.full((48,), 1e300, dtype=torch.float64)

    changed(folder, grow)


def has_a_head_of_its_own(folder):
    changed(folder, lambda t: t.update({"lm_head.weight": torch.ones(96, 48)}))


def is_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def is_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)


def is_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def has_no_config(folder):
    (folder / "config.json").unlink()


def has_another_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def has_a_broken_config(folder):
    (folder / "config.json").write_text("{")


def is_gone(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lacks_one, "lacks model.layers.1.mlp.up_proj.weight"),
        (has_one_more, "model.layers.9.extra is not a weight of the running target"),
        (has_another_shape, r"model.norm.weight has the shape \[50\].* needs \[48\]"),
        (has_nan, "model.layers.2.self_attn.o_proj.weight holds NaN or infinity"),
        (has_integers, "model.norm.weight has the type I32"),
        (overflows, "model.norm.weight holds values that do not fit in torch.float32"),
        (has_a_head_of_its_own, "lm_head.weight differs from model.embed_tokens.weight"),
        (is_cut_off, "model.safetensors"),
        (is_no_safetensors, "is not a safetensors file"),
        (is_a_pickle, "weights as pickle"),
        (has_no_config, "no config.json"),
        (has_another_config, "rms_norm_eps = 0.5, but the running target has"),
        (has_a_broken_config, "config.json"),
        (is_gone, "is not a folder"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(harm, named, tmp_path):
    running = Target(tied_model(0), (1, 3))
    assert running.fuse(64) is None
    before = computed(running)
    folder = tmp_path / "new"
    tied_model(1).save_pretrained(folder)
    harm(folder)

    with pytest.raises(ValueError, match=named):
        TargetWeights(running).read(folder)

    assert torch.equal(computed(running), before)
