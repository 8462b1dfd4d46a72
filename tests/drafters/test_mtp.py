"""MTP heads: each family's order as transformers computes it, and heads from a target's files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import DynamicCache, Qwen2Config, Qwen3_5TextConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3_5 import modeling_qwen3_5
from typer.testing import CliRunner

from buffer.bundles import read_bundle
from drafters.cli import app
from drafters.formats.checkpoint import read_checkpoint, write_checkpoint
from drafters.formats.mtp import from_carrier, to_carrier, to_speculators
from drafters.formats.published import TargetTable, imported, load_target_table, read_drafter
from drafters.initial import NewDrafter, made_drafter
from drafters.mtp import ORDERS, Mtp, MtpConfig, config_for_target
from drafters.mtp_learning import MtpTrainable
from oracles.bundle_folders import write_bundle
from targets.last_layer import load_last_layer
from tests.trainer.traffic import (
    HIDDEN,
    LAYERS,
    SHAPE,
    VOCAB,
    facts_of,
    fingerprint_of,
    save_target,
)

EPS = 1e-6
LENGTH = 9


def qwen2_layer(hidden_first):
    """Llama's layer with biases: that of MiMo, and of DeepSeek's head on a dense target."""
    config = Qwen2Config(**SHAPE, attn_implementation="eager", rms_norm_eps=EPS)
    config.mtp_hidden_states_first = hidden_first
    layer = MtpLayer(config, modeling_qwen2.Qwen2DecoderLayer, modeling_qwen2.Qwen2RMSNorm, 0)
    return config, layer, modeling_qwen2.Qwen2RotaryEmbedding(config)


def qwen3_5_layer():
    config = Qwen3_5TextConfig(
        **SHAPE, attn_implementation="eager", rms_norm_eps=EPS, layer_types=["full_attention"] * 4
    )
    layer = MtpLayer(
        config, modeling_qwen3_5.Qwen3_5DecoderLayer, modeling_qwen3_5.Qwen3_5RMSNorm, 0
    )
    rotary = modeling_qwen3_5.Qwen3_5TextRotaryEmbedding(config)
    # Text has the same position on all three axes.
    return config, layer, lambda x, at: rotary(x, at[None].expand(3, -1, -1))


MAKERS = {
    "deepseek_v3": lambda: qwen2_layer(False),
    "mimo": lambda: qwen2_layer(True),
    "qwen3_5": qwen3_5_layer,
}


def published_names(order):
    """Prefix of a name in transformers -> prefix in the family's checkpoints, from their files."""
    if order == "deepseek_v3":
        n = f"model.layers.{LAYERS}."
        return {"enorm": n + "enorm", "hnorm": n + "hnorm", "eh_proj": n + "eh_proj",
                "post_norm": n + "shared_head.norm", "mtp_block.": n}  # fmt: skip
    if order == "mimo":
        n = "model.mtp_layers.0."
        return {"enorm": n + "token_layernorm", "hnorm": n + "hidden_layernorm",
                "eh_proj": n + "input_proj", "post_norm": n + "final_layernorm",
                "mtp_block.": n}  # fmt: skip
    return {"enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden",
            "eh_proj": "mtp.fc", "post_norm": "mtp.norm",
            "mtp_block.": "mtp.layers.0."}  # fmt: skip


def head_tensors(order, layer):
    """The layer's tensors under the names of the family, and the norm of a target."""
    tensors = {"model.norm.weight": torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9))}
    for name, tensor in layer.state_dict().items():
        old, new = next((k, v) for k, v in published_names(order).items() if name.startswith(k))
        tensors[name.replace(old, new, 1)] = tensor.clone()
    return tensors


def made(order):
    torch.manual_seed(3)
    config, layer, rotary = MAKERS[order]()
    layer.eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(std=0.3).add_(parameter.dim() == 1)
    return config, layer, rotary


def carrier(folder, order, change=lambda _tensors: None):
    """A folder with the config of a target and the tensors of a head."""
    config, layer, rotary = made(order)
    tensors = head_tensors(order, layer)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return layer, rotary


@torch.no_grad()
def by_transformers(layer, rotary, embeds_TH, hidden_TH, num_more):
    """Outputs of the rows, then of ``num_more`` rows that each read the output before."""
    cache = DynamicCache(config=layer.config)
    hidden = hidden_TH[None]
    outputs = []
    for start, end in [(0, LENGTH), *((LENGTH + i, LENGTH + i + 1) for i in range(num_more))]:
        positions = torch.arange(start, end)[None]
        mask = torch.full((end - start, end), float("-inf")).triu(start + 1)[None, None]
        hidden = layer(
            embeds_TH[None, start:end], hidden, position_embeddings=rotary(hidden, positions),
            attention_mask=mask, position_ids=positions, past_key_values=cache,
        )  # fmt: skip
        outputs.append(hidden[0])
        hidden = hidden[:, -1:]
    return torch.cat(outputs)


class Causal:
    """Attention over all rows given so far."""

    def __init__(self):
        self.keys, self.values = None, None

    def __call__(self, q, k, v):
        before = 0 if self.keys is None else len(self.keys)
        self.keys = k if self.keys is None else torch.cat((self.keys, k))
        self.values = v if self.values is None else torch.cat((self.values, v))
        mask = torch.ones(len(q), len(self.keys), dtype=torch.bool).tril(before)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, self.keys, self.values))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out[0].transpose(0, 1)


@torch.no_grad()
def by_ours(model, embeds_TH, hidden_TH, num_more):
    attend, hidden, outputs = Causal(), hidden_TH, []
    for start, end in [(0, LENGTH), *((LENGTH + i, LENGTH + i + 1) for i in range(num_more))]:
        positions = torch.arange(start, end)
        hidden = model(embeds_TH[start:end], hidden, *model.rope(positions), attend)
        outputs.append(hidden)
        hidden = hidden[-1:]
    return torch.cat(outputs)


@pytest.mark.parametrize("order", ORDERS)
def test_a_familys_head_computes_what_transformers_does(tmp_path, order):
    """Rows over a prefix, then three more from the one head, each from the output before."""
    layer, rotary = carrier(tmp_path, order)
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(LENGTH + 3, HIDDEN, generator=generator)
    hidden = torch.randn(LENGTH, HIDDEN, generator=generator)

    model = MtpTrainable().carried_model(tmp_path, None)

    want = by_transformers(layer, rotary, embeds, hidden, 3)
    torch.testing.assert_close(by_ours(model, embeds, hidden, 3), want, atol=1e-5, rtol=1e-5)
    other = "mimo" if order != "mimo" else "deepseek_v3"
    turned = Mtp(MtpConfig.from_json(model.config.to_json() | {"order": other}))
    turned.load_state_dict(model.state_dict())
    assert not torch.allclose(by_ours(turned, embeds, hidden, 3), want, atol=0.1)


def test_hidden_states_are_those_behind_the_targets_norm(tmp_path):
    carrier(tmp_path, "qwen3_5")
    model = MtpTrainable().carried_model(tmp_path, None)
    stream = torch.randn(5, HIDDEN)
    weight = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9))

    normed = stream / (stream.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    torch.testing.assert_close(model.fuse(stream), normed * (1 + weight))
    assert model.config.layer_ids == (LAYERS,)


def latent(tensors):
    name = f"model.layers.{LAYERS}.self_attn."
    tensors[name + "kv_a_proj_with_mqa.weight"] = torch.ones(4, HIDDEN)


def mixture(tensors):
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.ones(4, HIDDEN)


def cut(tensors):
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :-1].clone()


@pytest.mark.parametrize(
    ("order", "change", "named"),
    [
        ("deepseek_v3", latent, "kv_a_proj_with_mqa.weight is not a tensor of an MTP head"),
        ("qwen3_5", mixture, "mlp.experts.0.gate_proj.weight is not a tensor of an MTP head"),
        ("qwen3_5", cut, rf"mtp.fc.weight has the shape \[{HIDDEN}, 63\], expected"),
        (
            "mimo",
            lambda t: t.pop("model.mtp_layers.0.token_layernorm.weight"),
            "token_layernorm.weight is missing",
        ),
    ],
)
def test_a_head_that_cannot_run_is_refused_by_its_tensor(tmp_path, order, change, named):
    carrier(tmp_path, order, change)

    with pytest.raises(ValueError, match=named):
        MtpTrainable().carried_model(tmp_path, None)


@pytest.fixture(scope="module")
def carrying_target(tmp_path_factory):
    """A Llama target whose folder also holds a head in MiMo's layout."""
    folder = tmp_path_factory.mktemp("target")
    model = save_target(folder, tie=False)
    tensors = head_tensors("mimo", made("mimo")[1])
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "mtp.safetensors")
    return folder, model


def test_new_weights_are_the_head_in_the_targets_files(carrying_target, tmp_path):
    folder, model = carrying_target
    facts = facts_of(folder, model)

    carried, content = made_drafter("mtp", facts, NewDrafter(imitated=folder))
    fresh, _ = made_drafter("mtp", facts, NewDrafter())
    by_command, files = imported(folder, load_target_table("t", folder))

    assert carried.drafter_config["order"] == "mimo" and carried.drafter_config["has_bias"]
    assert fresh.drafter_config["order"] == "deepseek_v3"
    assert by_command.drafter_config == carried.drafter_config
    assert files["drafter.safetensors"] == content
    vocab = tmp_path / "ids.json"
    vocab.write_text("[2, 3, 5, 7]")
    few, _ = made_drafter("mtp", facts, NewDrafter(imitated=folder, vocab=vocab))
    assert few.drafter_config["draft_vocab_size"] == 4


def test_a_head_that_cannot_run_leaves_new_weights_unless_it_is_demanded(tmp_path, caplog):
    model = save_target(tmp_path, tie=False)
    tensors = head_tensors("qwen3_5", made("qwen3_5")[1])
    mixture(tensors)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "mtp.safetensors")
    caplog.set_level("INFO")

    new = NewDrafter(imitated=tmp_path, must_imitate=False)
    made_with, _ = made_drafter("mtp", facts_of(tmp_path, model), new)

    assert made_with.drafter_config["order"] == "deepseek_v3"
    assert "cannot be used: " in caplog.text and "experts" in caplog.text
    with pytest.raises(ValueError, match=r"experts.*Set drafter.init to 'random'"):
        made_drafter("mtp", facts_of(tmp_path, model), NewDrafter(imitated=tmp_path))


def test_a_head_of_another_target_is_refused(carrying_target, tmp_path):
    carrier(tmp_path, "deepseek_v3", lambda _t: None)
    table = load_target_table("t", carrying_target[0])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))

    with pytest.raises(ValueError, match="its vocabulary is 97, the target's 96"):
        from_carrier(read_checkpoint(tmp_path), table)


@pytest.mark.parametrize("has_head_norms", [False, True])
def test_a_new_head_begins_as_the_targets_last_layer(tmp_path, has_head_norms):
    """Its layer, fed what the target's last layer reads, computes what that computes."""
    folder, target = tmp_path, save_target(tmp_path, tie=has_head_norms)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    target.save_pretrained(folder)
    last = load_last_layer(folder)
    learns = MtpTrainable()
    head = target.get_output_embeddings().weight.detach()
    model = learns.new_model(target.config, head, None, 0, last_layer=last)
    assert model.config.has_head_norms == has_head_norms
    stream = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH)
    model._pair = lambda _embeds, hidden: hidden  # past the parts that a target does not have
    model.proj = torch.nn.Identity()

    with torch.no_grad():
        ours = model(stream, stream, *model.rope(positions), Causal())
        rope = target.model.rotary_emb(stream, positions[None])
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
        theirs = target.model.layers[-1](
            stream[None], position_embeddings=rope, attention_mask=mask
        )
        want = target.model.norm(theirs)[0]

    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer_ids", [(1,), (1, LAYERS)])
def test_heads_read_the_last_layer_alone(carrying_target, layer_ids):
    model = carrying_target[1]

    with pytest.raises(ValueError, match=rf"must be \[{LAYERS}\] or null, got"):
        MtpTrainable().new_model(model.config, model.lm_head.weight, layer_ids, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_an_exported_head_is_read_back_with_equal_logits(tmp_path, order):
    """Also one that has learnt, its copy of the target's final norm included."""
    layer, _ = carrier(tmp_path, order)
    model = MtpTrainable().carried_model(tmp_path, None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 16)
    config, tensors = model.config.to_json(), model.bundle_tensors()
    target = TargetTable("t", tmp_path, layer.config, (), torch.zeros(VOCAB, HIDDEN))

    write_checkpoint(tmp_path / "out", *to_carrier(config, tensors, target))
    found = from_carrier(read_checkpoint(tmp_path / "out"), target)

    names = set(read_checkpoint(tmp_path).files) - {"model.norm.weight"}
    assert set(load_file(tmp_path / "out/model.safetensors")) == {
        *names,
        "slipstream.target_norm.weight",
    }
    assert found.config == config
    back = MtpTrainable().load_model(found.config, found.tensors)
    embeds = torch.randn(LENGTH + 3, HIDDEN, generator=generator)
    stream = torch.randn(LENGTH, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    with torch.no_grad():
        ours, theirs = (by_ours(m, embeds, m.fuse(stream), 3) @ head.T for m in (model, back))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.fixture
def plain_target(tmp_path):
    folder = tmp_path / "target"
    save_target(folder)
    return load_target_table("target", folder)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("has_learnt", [False, True])
def test_the_layout_of_speculators_is_read_back(plain_target, tmp_path, is_gated, has_learnt):
    """A copy of the target's norm that was not written is the target's."""
    gate = {"order": "qwen3_5", "has_output_gate": True, "rotary_dim": 4} if is_gated else {}
    config = replace(config_for_target(plain_target.config), has_head_norms=True, **gate).to_json()
    model = Mtp(MtpConfig.from_json(config))
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 16)
    own = dict(model.bundle_tensors())
    if not has_learnt:
        theirs = load_file(plain_target.folder / "model.safetensors")["model.norm.weight"]
        own["target_norm.weight"] = theirs

    written, tensors = to_speculators(config, own, plain_target)
    if not has_learnt:
        del tensors["slipstream.target_norm.weight"]
    write_checkpoint(tmp_path / "out", written, tensors)
    found = read_drafter(read_checkpoint(tmp_path / "out"), plain_target)

    layer = written["transformer_layer_config"]
    assert layer["model_type"] == ("qwen3_5_text" if is_gated else "qwen3")
    assert (found.kind, found.config) == ("mtp", config)
    for name, tensor in own.items():
        torch.testing.assert_close(found.tensors[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"has_head_norms": False}, "does not norm query and key heads"),
        ({"order": "mimo"}, "reads the hidden state before the embedding"),
        ({"has_bias": True}, "has a bias in its queries"),
        ({"rotary_dim": 4}, "rotates a part of each head, ungated"),
    ],
)
def test_a_head_whose_layer_speculators_lacks_is_not_written(plain_target, changed, named):
    given = replace(config_for_target(plain_target.config), has_head_norms=True)

    with pytest.raises(ValueError, match=f"the head {named}.* --format hf"):
        to_speculators(replace(given, **changed).to_json(), {}, plain_target)


def test_norms_that_are_stored_around_zero_keep_every_bit_of_bfloat16(tmp_path):
    """1 + weight in bfloat16 would turn 0.00175 into 0."""

    def small_norms(tensors):
        for name, tensor in tensors.items():
            tensors[name] = (tensor / 128 if "norm" in name else tensor).bfloat16()

    layer, _ = carrier(tmp_path, "qwen3_5", small_norms)
    target = TargetTable("t", tmp_path, layer.config, (), torch.zeros(VOCAB, HIDDEN))
    theirs = load_file(tmp_path / "model.safetensors")

    found = from_carrier(read_checkpoint(tmp_path), target)
    write_checkpoint(tmp_path / "out", *to_carrier(found.config, found.tensors, target))

    weight = theirs["mtp.pre_fc_norm_embedding.weight"].float()
    assert weight.abs().max() < 0.02
    assert torch.equal(found.tensors["embed_norm.weight"].float(), 1 + weight)
    written = load_file(tmp_path / "out/model.safetensors")
    for name in theirs.keys() - {"model.norm.weight"}:
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], theirs[name]), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"partial_rotary_factor": 0.5}, "its rotary_dim is 8, and .*config.json, .* says 4"),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "its rope_theta is 10000.0, and .* says 5.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not computed here"),
    ],
)
def test_a_head_that_the_targets_config_does_not_describe_is_not_written(tmp_path, changed, named):
    """Whoever read it would compute other logits."""
    layer, _ = carrier(tmp_path, "mimo")
    model = MtpTrainable().carried_model(tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    target = TargetTable("t", tmp_path, layer.config, (), torch.zeros(VOCAB, HIDDEN))

    with pytest.raises(ValueError, match=named):
        to_carrier(model.config.to_json(), model.bundle_tensors(), target)


def test_a_new_head_rotates_what_its_target_rotates():
    config = Qwen3_5TextConfig(**SHAPE)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25

    made_config = MtpTrainable().new_model(config, torch.zeros(VOCAB, HIDDEN), None, 0).config

    assert (made_config.rotary_dim, made_config.head_dim) == (2, 8)


def test_the_command_exports_a_head_that_it_imports_again(carrying_target, tmp_path):
    folder, model = carrying_target
    manifest, content = made_drafter("mtp", facts_of(folder, model), NewDrafter())
    learns = MtpTrainable()
    made_model = learns.load_model(manifest.drafter_config, load(content))
    write_bundle(
        tmp_path / "3", "mtp", manifest.drafter_config, fingerprint_of(folder),
        made_model.bundle_tensors(),
    )  # fmt: skip
    settings = ["--set", f"target={folder}"]

    words = ["export", str(tmp_path / "3"), "--to", str(tmp_path / "out"), "--format", "hf"]
    written = CliRunner().invoke(app, [*words, *settings])
    back = CliRunner().invoke(
        app, ["import", str(tmp_path / "out"), "--to", str(tmp_path / "back"), *settings]
    )

    assert written.exit_code == 0, written.output
    assert back.exit_code == 0, back.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert f"model.layers.{LAYERS}.eh_proj.weight" in read_checkpoint(tmp_path / "out").files
    bundle = read_bundle(tmp_path / "back/0")
    assert bundle.manifest.drafter_config == manifest.drafter_config
    assert bundle.files["drafter.safetensors"] == content
