"""EAGLE-3 as others publish it: round trips give the same bytes, and what does not fit is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from buffer.bundles import read_bundle
from buffer.manifest import TENSORS
from drafters.cli import app
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.formats.published import LAYOUTS, imported, load_target_table
from drafters.initial import NewDrafter, stored_drafter
from oracles.bundle_folders import write_bundle
from tests.trainer.traffic import HIDDEN, LAYER_IDS, VOCAB, facts_of, fingerprint_of

VARIANTS = ("norm_before_residual", "fc_norm", "norm_output")
REDUCED = 40


def drafter_for(model, reduced=False, variants=(), dtype=torch.bfloat16, seed=5):
    config = config_for_target(model.config, LAYER_IDS, REDUCED if reduced else None)
    values = config.to_json() | dict.fromkeys(variants, True)
    drafter = Eagle3(Eagle3Config.from_json(values))
    drafter.initialise(seed)
    for norm in (p for p in drafter.parameters() if p.dim() == 1):
        norm.data += torch.randn(norm.shape, generator=torch.Generator().manual_seed(1)) / 8
    if reduced:
        ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:REDUCED].sort()
        drafter.d2t.copy_(ids.values - torch.arange(REDUCED))
    return drafter.requires_grad_(False).to(dtype)


def bundle_of(drafter, folder, path):
    return write_bundle(
        path, "eagle3", drafter.config.to_json(), fingerprint_of(folder), drafter.bundle_tensors()
    )


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("reduced", "variants"),
    [(False, ()), (True, ()), (True, VARIANTS), (False, ("fc_norm", "norm_output"))],
    ids=["whole vocabulary", "reduced", "reduced, all variants", "EAGLE-3.1"],
)
def test_a_round_trip_gives_the_same_bytes(target, tmp_path, layout, reduced, variants):
    folder, model = target
    drafter = drafter_for(model, reduced, variants)
    ours = bundle_of(drafter, folder, tmp_path / "7")
    settings = ("--set", f"target={folder}")

    written = command(
        "export", tmp_path / "7", "--to", tmp_path / "out", "--format", layout, *settings
    )
    assert written.exit_code == 0, written.output
    back = command("import", tmp_path / "out", "--to", tmp_path / "back", *settings)
    assert back.exit_code == 0, back.output
    again = command(
        "export", tmp_path / "back/0", "--to", tmp_path / "out2", "--format", layout, *settings
    )
    assert again.exit_code == 0, again.output

    bundle = read_bundle(tmp_path / "back/0")
    assert bundle.files[TENSORS] == ours.files[TENSORS]
    assert bundle.manifest.drafter_config == drafter.config.to_json()
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_the_published_keys_are_those_of_the_field(target, tmp_path):
    folder, model = target
    bundle_of(drafter_for(model, reduced=True), folder, tmp_path / "0")
    command(
        "export", tmp_path / "0", "--to", tmp_path / "hf", "--format", "hf",
        "--set", f"target={folder}",
    )  # fmt: skip

    tensors = load_file(tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert "target_hidden_size" not in config  # EAGLE's code would expect an embedding table

    layer = (
        "hidden_norm input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj "
        "self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    names = {f"midlayer.{name}.weight" for name in layer.split()}
    assert set(tensors) == names | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 2 * HIDDEN)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == REDUCED and config["vocab_size"] == VOCAB
    # vLLM counts the layer that reads the residual stream, SGLang the one that wrote it.
    assert config["eagle_aux_hidden_state_layer_ids"] == list(LAYER_IDS)
    nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert nested == [k - 1 for k in LAYER_IDS]


@pytest.fixture(scope="module")
def published(target, tmp_path_factory):
    """A sound checkpoint with a reduced vocabulary."""
    folder, model = target
    home = tmp_path_factory.mktemp("published")
    bundle_of(drafter_for(model, reduced=True), folder, home / "0")
    done = command(
        "export", home / "0", "--to", home / "hf", "--format", "hf", "--set", f"target={folder}"
    )
    assert done.exit_code == 0, done.output
    return home / "hf"


def altered(published, tmp_path, tensors=lambda _t: None, config=lambda _c: None):
    """A copy with something changed."""
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    values = load_file(copy / "model.safetensors")
    tensors(values)
    save_file(values, copy / "model.safetensors")
    settings = json.loads((copy / "config.json").read_text())
    config(settings)
    (copy / "config.json").write_text(json.dumps(settings))
    return copy


def dropped(name):
    return lambda values: values.pop(name)


def set_to(name, value):
    return lambda values: values.update({name: value})


def moved(values):
    values["d2t"][3] += VOCAB


def unmarked(values):
    values["t2d"][:] = ~values["t2d"]


IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        (dropped("midlayer.mlp.up_proj.weight"), None, "midlayer.mlp.up_proj.weight is missing"),
        (
            set_to("fc.weight", torch.zeros(HIDDEN, HIDDEN)),
            None,
            rf"fc.weight has the shape \[{HIDDEN}, {HIDDEN}\], expected \[{HIDDEN}, {2 * HIDDEN}\]",
        ),
        (
            set_to("midlayer.self_attn.q_norm.weight", torch.ones(8)),
            None,
            "midlayer.self_attn.q_norm.weight is not a tensor of EAGLE-3",
        ),
        (set_to("norm.weight", torch.ones(HIDDEN).long()), None, "norm.weight is I64, expected"),
        (dropped("d2t"), None, "d2t is missing"),
        (moved, None, f"d2t maps a draft token outside the target's {VOCAB}"),
        (lambda v: v["d2t"].fill_(0), None, "t2d does not mark exactly"),
        (lambda v: v["d2t"].copy_(v["d2t"].flip(0)), None, "do not ascend|outside"),
        (unmarked, None, "t2d does not mark exactly"),
        (
            set_to("embed_tokens.weight", torch.ones(VOCAB, HIDDEN)),
            None,
            "embed_tokens.weight is not the target's table",
        ),
        (
            set_to("norm.weight", torch.full((HIDDEN,), torch.nan)),
            None,
            r"norm.weight holds NaN or infinity",
        ),
        (None, set_to("vocab_size", 95), "vocab_size is 95, the target has 96"),
        (None, set_to("hidden_size", 64), "hidden_size is 64, the target has 32"),
        (None, dropped("intermediate_size"), "config.json has no intermediate_size"),
        (None, set_to("attention_bias", True), "attention_bias is set"),
        (None, set_to("rope_scaling", {"rope_type": "yarn"}), "scaled by the rule 'yarn'"),
        (None, set_to("rope_scaling", "yarn"), "rope_scaling of config.json must be an object"),
        (None, set_to("eagle_config", [1]), "eagle_config of config.json must be an object, got"),
        (None, set_to("head_dim", "8"), "head_dim of config.json must be a positive integer"),
        (None, set_to(IDS, [1, 3]), "should be one less"),
        (None, set_to("eagle_config", {IDS: [9, 10]}), "should be one less"),
        (None, set_to("architectures", ["GPT2LMHeadModel"]), "in none of the layouts.*GPT2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(target, published, tmp_path, tensors, config, named):
    source = altered(published, tmp_path, tensors or (lambda _v: None), config or (lambda _v: None))
    table = load_target_table("target", target[0])

    with pytest.raises(ValueError, match=named):
        imported(source, table)


def test_pickle_files_are_refused_by_name(target, published, tmp_path):
    source = altered(published, tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")

    done = command("import", source, "--to", tmp_path / "new", "--set", f"target={target[0]}")

    assert done.exit_code == 1 and not (tmp_path / "new").exists()
    assert "only pytorch_model.bin, which may hold code and is not loaded" in done.output


def test_layers_in_sglangs_count_alone_are_shifted(target, published, tmp_path):
    source = altered(published, tmp_path, config=dropped(IDS))

    manifest, _ = imported(source, load_target_table("target", target[0]))

    assert manifest.drafter_config["layer_ids"] == list(LAYER_IDS)


def test_the_targets_own_embedding_may_be_there(target, published, tmp_path):
    folder, model = target
    own = model.get_input_embeddings().weight.detach().bfloat16()
    source = altered(published, tmp_path, set_to("embed_tokens.weight", own))

    manifest, files = imported(source, load_target_table("target", folder))

    assert manifest.kind == "eagle3" and set(files) == {TENSORS, "manifest.json"}


def test_a_bundle_of_another_target_is_not_exported(target, tmp_path):
    folder, model = target
    write_bundle(
        tmp_path / "0", "eagle3", drafter_for(model).config.to_json(), "a" * 64,
        drafter_for(model).bundle_tensors(),
    )  # fmt: skip

    done = command(
        "export", tmp_path / "0", "--to", tmp_path / "out", "--format", "hf",
        "--set", f"target={folder}",
    )  # fmt: skip

    assert done.exit_code == 1 and "was made for target aaaaaaaaaaaa, not for" in done.output


def test_nothing_is_overwritten(target, published, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()

    done = command("import", published, "--to", tmp_path / "full", "--set", f"target={target[0]}")

    assert done.exit_code == 1 and "is not empty; name a new folder" in done.output


def test_a_run_begins_with_an_imported_drafter(target, published, tmp_path):
    """``drafter.path`` takes it for version 0, and the export of version 0 is what was imported."""
    from buffer.backends import open_backend
    from drafters.initial import first_drafter

    folder, model = target
    settings = ("--set", f"target={folder}", "--set", f"run_dir={tmp_path / 'run'}")
    command("import", published, "--to", tmp_path / "new", *settings)
    facts = facts_of(folder, model)
    store = open_backend("log:", tmp_path / "run").open_weights()

    first = first_drafter(store, "eagle3", facts, path=tmp_path / "new/0", new=NewDrafter())
    done = command("export", 0, "--to", tmp_path / "out", "--format", "hf", *settings)

    assert first.manifest.version == 0 and first.layer_ids == LAYER_IDS
    assert stored_drafter(tmp_path / "new/0", facts).tensors.keys() == first.tensors.keys()
    assert done.exit_code == 0, done.output
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
    missing = command("export", 5, "--to", tmp_path / "o5", "--format", "hf", *settings)
    assert missing.exit_code == 1 and "has no version 5; it has [0]" in missing.output
