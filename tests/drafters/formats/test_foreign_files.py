"""Of every layout: what is missing, too much, misshapen, damaged or made for another target is
refused by a message that names it, and whatever a config says, nothing unusable is read."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.dflash.model import DFlash
from drafters.dflash.trainable import config_for_target as dflash_config
from drafters.formats.checkpoint import Checkpoint, FormatError, read_checkpoint
from drafters.formats.mtp import TARGET_NORM
from drafters.formats.published import export, load_target_table, read_drafter
from drafters.mtp import ORDERS, Mtp
from drafters.mtp import config_for_target as mtp_config
from drafters.trainable import trainable
from oracles.bundle_folders import write_bundle
from tests.drafters.formats.test_eagle3 import VARIANTS, bundle_of
from tests.drafters.formats.test_eagle3 import drafter_for as eagle3_for
from tests.drafters.test_dflash import published_folder
from tests.drafters.test_mtp import carrier
from tests.drafters.test_p_eagle import LEARNS as P_EAGLE
from tests.drafters.test_p_eagle import drafter_for as p_eagle_for
from tests.trainer.traffic import HIDDEN, VOCAB, fingerprint_of, save_target

LAYOUTS = (
    *(f"{kind} as {layout}" for kind in ("eagle3", "p_eagle") for layout in ("hf", "speculators")),
    "dflash",
    "dflash as speculators",
    *ORDERS,
    *(f"mtp as speculators, {kind}" for kind in ("plain", "gated")),
)


def dflash_for(target):
    config = dflash_config(target.config)
    windows = {"windows": (20, None), "causal": (True, False)}
    made = DFlash(replace(config, **windows))
    made.initialise(1)
    return made


def mtp_for(target, gated):
    """A head as ``speculators`` computes it."""
    gate = {"order": "qwen3_5", "has_output_gate": True, "rotary_dim": 4} if gated else {}
    made = Mtp(replace(mtp_config(target.config), has_head_norms=True, **gate))
    made.initialise(1)
    return made


def split(folder):
    """One file for each tensor, so that one of them can be changed."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")


def written(layout, home, target, table):
    """A sound folder in a layout."""
    kind, _, written_as = layout.partition(" as ")
    folder = home / layout.replace(" ", "_").replace(",", "")
    if kind == "eagle3":
        variants = VARIANTS if written_as == "speculators" else ()
        bundle = bundle_of(
            eagle3_for(target, True, variants), home / "target", home / str(1 + len(variants))
        )
        export(bundle, written_as, table, folder)
    elif kind == "p_eagle":
        made = p_eagle_for(target, reduced=written_as == "hf")
        bundle = write_bundle(
            home / str(10 + len(written_as)), kind, P_EAGLE.config_to_json(made),
            fingerprint_of(home / "target"), made.bundle_tensors(),
        )  # fmt: skip
        export(bundle, written_as, table, folder)
    elif layout == "dflash":
        published_folder(folder, target)
    elif kind in ("dflash", "mtp"):
        made = dflash_for(target) if kind == "dflash" else mtp_for(target, "gated" in layout)
        bundle = write_bundle(
            home / str(20 + LAYOUTS.index(layout)), kind, made.config.to_json(),
            fingerprint_of(home / "target"), dict(made.state_dict()),
        )  # fmt: skip
        export(bundle, "speculators", table, folder)
    else:
        folder.mkdir()
        carrier(folder, kind)
    split(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def target(home):
    model = save_target(home / "target")
    return model, load_target_table("target", home / "target")


@pytest.fixture(scope="module", params=LAYOUTS)
def sound(request, home, target):
    """A folder that can be read, its target, and what is read."""
    model, table = target
    folder = written(request.param, home, model, table)
    checkpoint = read_checkpoint(folder)
    return checkpoint, table, read_drafter(checkpoint, table)


def same(found, wanted):
    return found.config == wanted.config and all(
        torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items()
    )


def outcome(checkpoint, table):
    """What is read, or the message of the refusal behind the folder's name."""
    try:
        return read_drafter(checkpoint, table), None
    except FormatError as error:
        folder, _, problem = str(error).partition(": ")
        assert folder == str(checkpoint.folder)
        return None, problem


def with_tensor(checkpoint, name, tensor, tmp_path):
    save_file({name: tensor}, tmp_path / "changed.safetensors")
    return replace(checkpoint, files={**checkpoint.files, name: tmp_path / "changed.safetensors"})


OPTIONAL = ("embed_tokens.weight", TARGET_NORM)
"""Another server needs the one, ours has the target's; of the other the target has its own."""


def test_a_missing_tensor_is_named(sound):
    checkpoint, table, _ = sound
    for name in checkpoint.files:
        files = {other: path for other, path in checkpoint.files.items() if other != name}
        found, problem = outcome(replace(checkpoint, files=files), table)
        if found is None:
            # Without this one there is no head; without one of several, the others are too much.
            is_head = name.endswith(("eh_proj.weight", "mtp.fc.weight", "input_proj.weight"))
            is_head = is_head and "none of the layouts" in problem
            assert is_head or name in problem or name.replace("q_", "k_") in problem, problem
        else:
            assert name in OPTIONAL, name
    empty, problem = outcome(replace(checkpoint, files={}), table)
    assert empty is None and problem, "nothing is read of no tensors"


def test_a_misshapen_tensor_and_one_of_integers_are_named(sound, tmp_path):
    checkpoint, table, _ = sound
    for name in checkpoint.files:
        tensor = checkpoint.read(name)
        longer = torch.cat((tensor, tensor[:1]))
        kind = torch.float32 if not tensor.is_floating_point() else torch.int64
        for changed in (longer, tensor[:-1], tensor[None], tensor.to(kind)):
            changed = with_tensor(checkpoint, name, changed.contiguous(), tmp_path)
            found, problem = outcome(changed, table)
            assert found is None, f"{name} was read all the same"
            assert name in problem, (name, problem)


def test_a_tensor_that_nobody_knows_is_named(sound, tmp_path):
    checkpoint, table, _ = sound
    near = next(n for n in checkpoint.files if n.endswith("self_attn.k_proj.weight"))
    for name in (near.replace("k_proj", "kv_proj"), near.replace("k_proj.weight", "k_proj.scale")):
        changed = with_tensor(checkpoint, name, torch.ones(3), tmp_path)
        found, problem = outcome(changed, table)
        assert found is None and problem.startswith(f"{name} is not a tensor of"), problem


def test_a_file_that_ends_early_is_named(sound, tmp_path):
    checkpoint, _, _ = sound
    name, path = max(checkpoint.files.items(), key=lambda item: item[1].stat().st_size)
    whole = path.read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    for length in (0, 4, 8, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"{name}.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="is no sound safetensors file"):
            read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config)[:-9])
    with pytest.raises(FormatError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused_unless_an_index_says_which_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for file, value in (("a", 1.0), ("b", 2.0)):
        save_file({"fc.weight": torch.tensor([value])}, tmp_path / f"{file}.safetensors")

    def with_index(file):
        text = json.dumps({"weight_map": {"fc.weight": f"{file}.safetensors"}})
        (tmp_path / "model.safetensors.index.json").write_text(text)
        return read_checkpoint(tmp_path)

    with pytest.raises(FormatError, match=r"fc.weight is in a.safetensors and in b.safetensors"):
        read_checkpoint(tmp_path)
    assert with_index("a").read("fc.weight") == 1
    assert with_index("b").read("fc.weight") == 2
    with pytest.raises(FormatError, match=r"fc.weight is in a.safetensors and in b.safetensors"):
        with_index("c")
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"names b.safetensors for fc.weight, which is elsewhere"):
        with_index("b")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(FormatError, match=r"index.json has no weight_map"):
        read_checkpoint(tmp_path)


def test_a_config_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000 + "]" * 100_000)

    with pytest.raises(FormatError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path)


def places(config, above=()):
    """Paths of all values of a config, at any depth of objects."""
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def replaced(config, path, value):
    changed = copy.deepcopy(config)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is places:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


WRONG = (
    places, None, "x", "", -1, 0, 1, 3, 10**9, 10**30, 2.5, -0.5, math.nan, True, [], [None],
    [10**9], {}, {"x": 1}, {"rope_type": "yarn"},
)  # fmt: skip
"""Values that JSON may hold anywhere; the first: none at all."""


def unusable(found, table):
    """Why a drafter could not draft for this target; ``None`` if it could."""
    c = found.config
    first = c.get("first", c)
    made = trainable(found.kind).load_model(found.config, found.tensors)
    if not all(0 <= k <= table.num_layers for k in first["layer_ids"]):
        return "layer_ids"
    if not 0 <= c.get("mask_token_id", 0) < table.vocab_size:
        return "mask_token_id"
    if first["num_heads"] % first["num_kv_heads"] or first["head_dim"] % 2:
        return "heads"
    if not (0 < first["rms_norm_eps"] < math.inf and 0 < first["rope_theta"] < math.inf):
        return "rms_norm_eps or rope_theta"
    if c.get("block_size", 2) < 2:
        return "block_size"
    return None if all(p.isfinite().all() for p in made.parameters()) else "weights"


def test_whatever_a_config_says_nothing_unusable_is_read(sound):
    checkpoint, table, wanted = sound
    refused = 0

    def read_with(path, value):
        config = replaced(checkpoint.config, path, value)
        found, problem = outcome(replace(checkpoint, config=config), table)
        # A message without the key would only say what Python's operation wanted.
        assert found is not None or "wrong type" not in problem, (path, value, problem)
        return found

    for path in places(checkpoint.config):
        unread = [read_with(path, value) for value in (places, [{"x": 1}])]
        if all(found is not None and same(found, wanted) for found in unread):
            continue  # a key that nobody reads
        for value in WRONG:
            found = read_with(path, value)
            refused += found is None
            if found is not None and not same(found, wanted):
                assert unusable(found, table) is None, (path, value)
    assert refused > 40


ROTARY = (
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta of config.json must be a positive number"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "must be a positive number, got '1e6'"),
    ({"rope_scaling": {"rope_theta": True}}, "must be a positive number, got True"),
    ({"rope_theta": 10**400}, "rope_theta of config.json must be a positive number, got 1000"),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, "is 500000.0 and 1000000.0"),
    (
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}},
        "scaled by the rule 'yarn' of rope_parameters",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters has one rotary embedding for full_attention",
    ),
)
"""Rotary embeddings that every layout refuses in the same words."""
UNCOMPUTED = (
    ("eagle3 as hf", {"use_sliding_window": True, "sliding_window": 5}, "sliding_window is 5"),
    ("eagle3 as hf", {"partial_rotary_factor": 0.5}, "partial_rotary_factor leaves 4 of 8"),
    ("eagle3 as hf", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is"),
    ("eagle3 as hf", {"logit_scale": 0.5}, "logit_scale is 0.5"),
    ("eagle3 as hf", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("eagle3 as hf", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("eagle3 as hf", {"eagle_config": 3}, "eagle_config of config.json must be an object, got 3"),
    (
        "eagle3 as hf",
        {"eagle_aux_hidden_state_layer_ids": 3},
        "eagle_aux_hidden_state_layer_ids must be a list of layers, got 3",
    ),
    ("p_eagle as hf", {"logit_scale": 0.5}, "logit_scale is 0.5"),
    ("p_eagle as hf", {"num_hidden_layers": 2}, "but num_hidden_layers is 2"),
    (
        "p_eagle as speculators",
        {"transformer_layer_config": 5},
        "transformer_layer_config of config.json must be an object, got 5",
    ),
    ("dflash", {"partial_rotary_factor": 0.5}, "partial_rotary_factor leaves"),
    ("dflash", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves"),
    *((kind, change, said) for kind in ("eagle3 as hf", "dflash") for change, said in ROTARY),
    ("dflash", {"use_aux_hidden_state": False}, "use_aux_hidden_state is False"),
    ("dflash as speculators", {"sample_from_anchor": True}, "sample_from_anchor is True"),
    ("dflash as speculators", {"draft_vocab_size": 40}, "draft_vocab_size is 40, the target has"),
    ("dflash as speculators", {"transformer_layer_config": {}}, "has no transformer_layer_config"),
    (
        "dflash as speculators",
        {"aux_hidden_state_layer_ids": [9]},
        "aux_hidden_state_layer_ids is [9], not a list of 0..4",
    ),
    ("mtp as speculators, plain", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    (
        "mtp as speculators, plain",
        {"transformer_layer_config": {"model_type": "llama"}},
        "model_type of transformer_layer_config is 'llama'; MTP heads of speculators are read",
    ),
    ("mimo", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("mimo", {"text_config": "x"}, "text_config of config.json must be an object, got 'x'"),
    ("qwen3_5", {"partial_rotary_factor": 0.5}, "partial_rotary_factor of config.json is 0.5 and"),
    ("deepseek_v3", {"layer_types": ["sliding_attention"] * 4}, "layer_types is "),
    ("deepseek_v3", {"sliding_window": 4, "use_sliding_window": True}, "sliding_window is 4"),
)


@pytest.mark.parametrize(
    ("layout", "changed", "named"),
    UNCOMPUTED,
    ids=[f"{layout}, {next(iter(keys))}" for layout, keys, _ in UNCOMPUTED],
)
def test_what_is_not_computed_is_refused_by_its_key(target, home, layout, changed, named):
    model, table = target
    folder = home / layout.replace(" ", "_").replace(",", "")
    checkpoint = read_checkpoint(folder if folder.exists() else written(layout, home, model, table))

    found, problem = outcome(replace(checkpoint, config={**checkpoint.config, **changed}), table)

    assert found is None
    assert named in problem, problem


def test_another_vocabulary_is_named(sound, tmp_path):
    checkpoint, table, _ = sound
    smaller = replace(table, embed_VH=table.embed_VH[: VOCAB - 3])
    found, problem = outcome(checkpoint, smaller)
    assert found is None
    assert str(VOCAB) in problem and str(VOCAB - 3) in problem and "vocab" in problem

    narrower = replace(table, embed_VH=table.embed_VH[:, : HIDDEN - 2])
    found, problem = outcome(checkpoint, narrower)
    assert found is None
    assert "hidden" in problem and str(HIDDEN - 2) in problem


def test_what_a_checkpoint_says_itself_comes_before_its_layers_config():
    layer = {"hidden_size": 8, "vocab_size": 5}
    given = {"hidden_size": 16, "transformer_layer_config": layer}
    merged = Checkpoint(Path("drafter"), given, {}).with_layer()

    assert (merged.size("hidden_size"), merged.size("vocab_size")) == (16, 5)
