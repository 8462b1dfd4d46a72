"""Version 0 of a run is the same whoever publishes it, and unsuitable bundles are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from buffer.bundles import read_bundle
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from configs.schema import DrafterSettings
from drafters.initial import (
    NewDrafter,
    TargetFacts,
    first_drafter,
    made_drafter,
    new_drafter,
    publish_initial,
    stored_drafter,
)
from drafters.trainable import trainable
from oracles.engines import random_model
from targets.last_layer import load_last_layer
from tests.trainer.traffic import save_target, settings_for

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def target():
    model = random_model("qwen3")
    return TargetFacts(model.config, model.lm_head.weight, FINGERPRINT)


def first(root, target, kind="eagle3", path=None, seed=1, layer_ids=None):
    store = FolderWeights(root)
    return first_drafter(store, kind, target, path=path, new=NewDrafter(layer_ids, seed))


def test_equal_settings_make_equal_bytes_and_seeds_differ(target):
    one = made_drafter("eagle3", target, NewDrafter(seed=1))
    torch.manual_seed(99)  # the global generator has no influence

    assert made_drafter("eagle3", target, NewDrafter(seed=1)) == one
    assert made_drafter("eagle3", target, NewDrafter(seed=2))[1] != one[1]


def test_the_second_to_publish_leaves_the_first_one_in_place(tmp_path, target):
    manifest, content = made_drafter("eagle3", target, NewDrafter(seed=1))
    publish_initial(FolderWeights(tmp_path), manifest, content)

    publish_initial(FolderWeights(tmp_path), *made_drafter("eagle3", target, NewDrafter(seed=2)))

    assert FolderWeights(tmp_path).versions() == [0]
    assert read_bundle(tmp_path / "0").files[TENSORS] == content


def test_an_empty_store_gets_random_weights_and_the_next_process_reads_them(tmp_path, target):
    begun = first(tmp_path, target, layer_ids=(1, 2))

    again = first(tmp_path, target, seed=2)

    assert (begun.manifest.version, begun.layer_ids) == (0, (1, 2))
    assert again.manifest == begun.manifest
    assert all(again.tensors[name].equal(t) for name, t in begun.tensors.items())
    assert begun.tensors["lm_head.weight"].equal(target.lm_head_VH.detach())


def test_version_0_is_a_copy_of_the_bundle_in_drafter_path(tmp_path, target):
    other, root = tmp_path / "other", tmp_path / "run"
    given = first(other, target)
    FolderWeights(other).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(given.tensors)}
    )

    copied = first(root, target, path=other / "1", seed=2)

    assert (copied.manifest.version, copied.manifest.parent) == (0, None)
    assert read_bundle(root / "0").files == read_bundle(other / "1").files


def test_a_version_that_was_rolled_back_is_passed_over_with_a_warning(tmp_path, target, caplog):
    given = first(tmp_path, target)
    FolderWeights(tmp_path).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(given.tensors)}
    )
    FolderWeights(tmp_path).write_denied({1})

    assert first(tmp_path, target).manifest.version == 0

    assert caplog.messages == ["version 1 was rolled back. Starting with version 0."]


def spoiled(tmp_path, target, **changes):
    """Folder of a bundle with another manifest."""
    given = first(tmp_path / "given", target)
    folder = tmp_path / "spoiled"
    FolderWeights(folder).publish(
        replace(given.manifest, **changes), {TENSORS: save(given.tensors)}
    )
    return folder / "0"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_fingerprint": "0" * 64}, "was made for target 000000000000, but the target in"),
        ({"kind": "medusa"}, "of kind 'medusa', but drafter.kind is 'eagle3'"),
        ({"drafter_config": {"hidden_size": 3}}, "not an EAGLE-3 config"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_before_it_is_published(
    tmp_path, target, changes, text
):
    path = spoiled(tmp_path, target, **changes)

    with pytest.raises(ValueError, match=text):
        first(tmp_path / "run", target, path=path)

    assert FolderWeights(tmp_path / "run").versions() == []


def test_a_drafter_for_another_vocabulary_is_refused(tmp_path, target):
    first(tmp_path, target)
    smaller = replace(target, lm_head_VH=target.lm_head_VH[1:])

    with pytest.raises(ValueError, match=r"vocabulary 96 .*, but the target has 95"):
        first(tmp_path, smaller)


def test_tensors_that_contradict_the_config_are_refused(tmp_path, target):
    given = first(tmp_path, target)
    tensors = load(read_bundle(tmp_path / "0").files[TENSORS])
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:].contiguous()
    FolderWeights(tmp_path).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(tensors)}
    )

    with pytest.raises(ValueError, match=r"(?s)1 contradicts itself.*size mismatch for fc\.weight"):
        stored_drafter(tmp_path / "1", target)


def test_a_missing_folder_is_named_as_the_setting(tmp_path, target):
    with pytest.raises(ValueError, match=r"drafter\.path .*none is not a folder"):
        first(tmp_path, target, path=tmp_path / "none")


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ({"config.json": b"{}", "model.safetensors": b""}, r"manifest\.json cannot be read"),
        ({"manifest.json": b"{"}, r"manifest\.json"),
    ],
    ids=["a published layout", "cut short"],
)
def test_a_folder_that_is_no_bundle_is_named_as_the_setting(tmp_path, target, held, problem):
    """Nothing is published here, and no next version comes: it says what makes a bundle."""
    folder = tmp_path / "0"
    folder.mkdir()
    for name, content in held.items():
        (folder / name).write_bytes(content)

    with pytest.raises(
        ValueError, match=rf"drafter\.path .* sound bundle: .*{problem}.*`drafters import` makes"
    ) as raised:
        first(tmp_path / "run", target, path=folder)

    assert "next published version" not in str(raised.value)
    assert FolderWeights(tmp_path / "run").versions() == []


def test_a_bundle_of_another_kind_is_a_matter_of_the_path_and_a_version_one_of_the_run(
    tmp_path, target
):
    first(tmp_path / "given", target)

    with pytest.raises(ValueError, match=r"of kind 'eagle3'.* Choose another drafter\.path"):
        first(tmp_path / "run", target, kind="mtp", path=tmp_path / "given/0")
    with pytest.raises(ValueError, match=r"of kind 'eagle3'.* Choose another run_dir"):
        first(tmp_path / "given", target, kind="mtp")


def test_a_kind_that_does_not_learn_has_no_version_0(tmp_path, target):
    with pytest.raises(ValueError, match="kind 'suffix' cannot be trained; kinds that learn: eag"):
        first(tmp_path, target, kind="suffix")

    assert list(tmp_path.iterdir()) == []


# --- from the target, and with fewer tokens ---------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["qwen3", "llama"])
def saved(request, tmp_path_factory):
    """A target on disk: Qwen3 has norms of the heads, Llama has none."""
    folder = tmp_path_factory.mktemp("target")
    return folder, save_target(folder, tie=request.param)


def facts_of(model):
    return TargetFacts(model.config, model.get_output_embeddings().weight, FINGERPRINT)


def model_of(saved, **new):
    manifest, content = made_drafter("eagle3", facts_of(saved[1]), NewDrafter(**new))
    return trainable("eagle3").load_model(manifest.drafter_config, load(content))


def test_a_layer_that_begins_as_the_targets_last_one_computes_what_that_computes(saved):
    """Fed with the stream before the last layer, it has that layer's output at every position."""
    folder, target = saved
    num_layers = target.config.num_hidden_layers
    drafter = model_of(saved, imitated=folder, layer_ids=(1, num_layers - 1))
    last = target.model.layers[-1]
    ids = torch.randint(
        0, target.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0)
    )
    streams = []
    with last.register_forward_hook(lambda _m, given, out: streams.append((given[0], out))):
        seen = target(ids, output_hidden_states=True).hidden_states
    before, after = streams[0][0], streams[0][1]
    features = torch.cat((seen[1], before), dim=-1)[0]
    embeds = torch.randn(9, target.config.hidden_size)  # must not matter

    def attend(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, is_causal=True
        )
        return mixed.transpose(0, 1)

    fused = drafter.fuse(features)
    torch.testing.assert_close(fused, before[0])
    found = drafter(embeds, fused, *drafter.rope(torch.arange(9)), attend)
    if not hasattr(last.self_attn, "q_norm"):
        torch.testing.assert_close(found, after[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            drafter.logits(found), target(ids).logits[0], rtol=1e-4, atol=1e-4
        )
    else:  # the first position attends to itself alone, whatever its queries and keys are
        torch.testing.assert_close(found[0], after[0, 0], rtol=1e-4, atol=1e-4)


def test_weights_from_the_target_are_a_function_of_target_and_seed(saved):
    folder, target = saved
    one = made_drafter("eagle3", facts_of(target), NewDrafter(seed=1, imitated=folder))

    assert made_drafter("eagle3", facts_of(target), NewDrafter(seed=1, imitated=folder)) == one
    assert made_drafter("eagle3", facts_of(target), NewDrafter(seed=1))[1] != one[1]


def with_init(run_dir, target, init):
    settings = settings_for(run_dir, target)
    return settings.model_copy(update={"drafter": DrafterSettings(init=init)})


@pytest.mark.parametrize(("init", "is_copied"), [("auto", True), ("random", False)])
def test_new_weights_begin_as_the_targets_last_layer_where_it_can_be_copied(
    saved, tmp_path, init, is_copied
):
    imitated = new_drafter(with_init(tmp_path, saved[0], init)).imitated

    assert imitated == (saved[0] if is_copied else None)


def test_a_target_that_is_no_folder_is_refused_only_where_its_layer_is_demanded(tmp_path):
    nowhere = tmp_path / "nowhere"

    assert new_drafter(with_init(tmp_path, nowhere, "auto")).imitated is None
    with pytest.raises(ValueError, match="is neither a folder nor a GGUF file"):
        new_drafter(with_init(tmp_path, nowhere, "target"))


def other_layers(folder, _saved):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return "is a gpt2: only layers like Llama's can be copied"


def damaged(folder, saved):
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return r"model\.norm\.weight of the target in .* holds NaN or infinity"


@pytest.mark.parametrize("spoil", [other_layers, damaged])
def test_a_layer_that_cannot_be_copied_leaves_random_weights_unless_it_is_demanded(
    saved, tmp_path, spoil
):
    problem, facts = spoil(tmp_path, saved), facts_of(saved[1])
    chosen = new_drafter(with_init(tmp_path, tmp_path, "auto"))

    made = made_drafter("eagle3", facts, chosen)

    assert made == made_drafter("eagle3", facts, NewDrafter(seed=chosen.seed))
    demanded = new_drafter(with_init(tmp_path, tmp_path, "target"))
    with pytest.raises(ValueError, match=rf"{problem}.*Set drafter\.init to 'random'"):
        made_drafter("eagle3", facts, demanded)


def test_a_drafter_of_few_tokens_proposes_these(saved, tmp_path):
    ids = [3, 7, 8, 40, 95]
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([95, 3, 8, 7, 40, 3]))

    drafter = model_of(saved, imitated=saved[0], vocab=path)

    head = saved[1].get_output_embeddings().weight
    assert drafter.to_target_ids(torch.arange(5)).tolist() == ids
    assert drafter.lm_head.weight.equal(head[ids])
    assert drafter.config.draft_vocab_size == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "cannot be read"),
        ('{"a": 1}', "not a JSON list"),
        ("[1, true]", "not a JSON list"),
        ("[]", "must list token ids from 0 to 95"),
        ("[5, 96]", "must list token ids from 0 to 95"),
        ("[-1]", "must list token ids from 0 to 95"),
    ],
)
def test_a_vocabulary_that_is_none_is_an_error(saved, tmp_path, text, message):
    path = tmp_path / "ids.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        model_of(saved, vocab=path)


def test_a_target_without_llamas_layers_cannot_be_imitated(saved, tmp_path):
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))

    with pytest.raises(ValueError, match=r"is a gemma: only layers like Llama's can be copied"):
        load_last_layer(tmp_path)
