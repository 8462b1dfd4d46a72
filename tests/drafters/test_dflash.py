"""DFlash drafts a block at once: serving equals training, masks are as published, and published
checkpoints are read or refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from drafters.dflash.model import DFlash
from drafters.dflash.trainable import (
    DFlashTrainable,
    _anchors,
    _lengths,
    block_hidden,
    config_for_target,
    default_layer_ids,
)
from drafters.formats.checkpoint import FormatError, read_checkpoint, write_checkpoint
from drafters.formats.dflash import from_published, to_published, to_speculators
from drafters.formats.published import TargetTable, read_drafter
from drafters.protocol import Weights
from oracles.engines import make_engine, random_model, request_of
from policies.fixed import FixedPolicy
from tests.serving.capture.test_capture import PROMPT, traces_of
from tests.serving.engine.test_every_drafter import head_of, trained_on

LEARNS = DFlashTrainable()
MASKS = {
    "all of it": ((None, None), (False, False)),
    "a window": ((6, None), (False, False)),
    "causal": ((None, 9), (True, True)),
    "mixed": ((7, None), (True, False)),
    "published": ((20, None), (True, False)),
}


def module_for(model, masks="all of it", block_size=6) -> DFlash:
    windows, causal = MASKS[masks]
    config = config_for_target(model.config, block_size=block_size).to_json()
    found = type(config_for_target(model.config)).from_json(
        {**config, "windows": windows, "causal": causal}
    )
    module = DFlash(found)
    module.initialise(3)
    return module


@pytest.mark.parametrize(
    ("masks", "num_draft", "fused", "architecture"),
    [
        *((*one, "qwen3") for one in product(MASKS, (2, 5), (False, True))),
        ("published", 5, False, "gemma3"),  # which scales its embedding
    ],
)
def test_draft_logits_of_serving_and_training_are_equal(
    monkeypatch, masks, num_draft, fused, architecture
):
    model = random_model(architecture, head_dim=16)
    module = module_for(model, masks)
    weights = Weights(0, module.config.to_json(), dict(module.state_dict()))
    engine = make_engine(
        model, kind="dflash", weights=weights, policy=FixedPolicy("dflash", num_draft),
        suffix=False, prefill_chunk=7, fused_drafter=fused, max_draft=5,
    )  # fmt: skip
    drafter = engine.drafting.neural["dflash"].drafter
    assert drafter.is_fused == fused
    seen, propose, observe = [], drafter.propose, drafter.observe

    def keep(outputs, at, num_draft, choose):
        def kept(logits, number):
            seen.append(logits[0].clone())
            return choose(logits, number)

        return propose(outputs, at, num_draft, kept)

    monkeypatch.setattr(drafter, "propose", keep)
    # The log holds bfloat16: serving shall read the very numbers that training will.
    monkeypatch.setattr(
        drafter, "observe", lambda ids, rows, at: observe(ids, rows.bfloat16().float(), at)
    )
    trace = traces_of(engine, [request_of("a", PROMPT, 40)])[0]["a"]
    batch, head = trained_on(trace), head_of(model)
    anchors = torch.arange(len(batch.row_R))
    with torch.no_grad():
        hidden = block_hidden(module, head, batch, anchors, num_draft, None)
        logits = (hidden @ head.lm_head.weight_VH.T).view(len(anchors), num_draft, -1)
    row_of = {int(p): r for r, p in enumerate(batch.row_R)}

    compared = passes = 0
    for one in trace.rounds:
        if one.anchor in row_of and len(one.draft_ids) == num_draft:
            for step in range(num_draft):
                want = logits[row_of[one.anchor], step]
                torch.testing.assert_close(seen[passes + step], want, atol=1e-4, rtol=0)
                compared += 1
        passes += one.draft_k if one.draft_ids else 0
    assert compared >= 30


def test_a_block_sees_nothing_of_its_anchor_or_behind_it():
    """The anchor's own hidden state would tell the next token."""
    model = random_model("qwen3")
    module, head = module_for(model), head_of(model)
    engine = make_engine(model, kind="dflash", suffix=False)
    batch = trained_on(traces_of(engine, [request_of("a", PROMPT, 30)])[0]["a"])
    row = torch.tensor([len(batch.row_R) // 2])
    place = int(batch.row_R[row])

    def hidden(change):
        changed = copy.deepcopy(batch)
        change(changed.features_TF)
        with torch.no_grad():
            return block_hidden(module, head, changed, row, 5, None)

    plain = hidden(lambda _: None)
    assert torch.equal(plain, hidden(lambda rows: rows[place:].mul_(-3)))
    assert not torch.allclose(plain, hidden(lambda rows: rows[place - 1].mul_(-3)))


def test_rows_behind_the_end_of_a_block_change_nothing():
    model = random_model("qwen3")
    module, head = module_for(model), head_of(model)
    engine = make_engine(model, kind="dflash", suffix=False)
    batch = trained_on(traces_of(engine, [request_of("a", PROMPT, 30)])[0]["a"])
    rows = torch.tensor([3, 9, 12])
    with torch.no_grad():
        short = block_hidden(module, head, batch, rows, 2, None).view(3, 2, -1)
        long = block_hidden(module, head, batch, rows, 5, torch.full((3,), 3)).view(3, 5, -1)

    torch.testing.assert_close(short, long[:, :2])


def test_anchors_are_drawn_anew_among_rows_with_a_loss_and_blocks_have_any_length():
    model = random_model("qwen3")
    engine = make_engine(model, kind="dflash", suffix=False)
    batch = trained_on(traces_of(engine, [request_of("a", PROMPT, 120)])[0]["a"])
    generator = torch.Generator().manual_seed(0)
    batch.is_row_R[::2] = False

    first, second = (_anchors(batch, generator) for _ in range(2))

    assert len(first) == len(second) == 64 < len(batch.row_R)
    assert batch.is_row_R[first].sum() == min(64, int(batch.is_row_R.sum()))
    assert not torch.equal(first, second)
    lengths = _lengths(torch.zeros(1000), 16, generator)
    assert set(lengths.tolist()) == set(range(2, 17))
    assert 400 < int((lengths == 16).sum()) < 600


def test_new_layers_do_not_drown_the_embedding():
    """A mask reads the anchor's token through it. Here each row attends to itself alone, which adds
    as much as attention can."""
    model = random_model("qwen3")
    module = DFlash(module_for(model).config)
    module.initialise(0)
    streams = []
    module.norm.register_forward_pre_hook(lambda _module, given: streams.append(given[0]))
    width = module.config.hidden_size
    embeds = 0.1 * torch.randn(9, width, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        module(embeds, *module.rope(torch.arange(9)), lambda _layer, q, _k, v: v.repeat(1, 2, 1))

    added = streams[0] - embeds
    assert 0 < added.norm() < 2 * embeds.norm()


def test_longer_drafts_than_a_block_holds_are_refused():
    model = random_model("qwen3")
    module = module_for(model, block_size=6)
    weights = Weights(0, module.config.to_json(), dict(module.state_dict()))

    make_engine(model, kind="dflash", weights=weights, max_draft=5)

    with pytest.raises(ValueError, match=r"max_draft is 6, but blocks of 6 .*; set .* to 5"):
        make_engine(model, kind="dflash", weights=weights, max_draft=6)


@pytest.mark.parametrize(
    ("num_layers", "published"),
    [(36, [1, 9, 17, 25, 33]), (64, [1, 16, 31, 46, 61]), (32, [1, 8, 15, 22, 29])],
)
def test_tapped_layers_are_those_of_published_drafters(num_layers, published):
    """Qwen3-8B, Qwen3.6-27B, Qwen3.5-4B; published ids count from 0, ours say how many layers."""
    assert default_layer_ids(num_layers) == tuple(k + 1 for k in published)


def published_module(model):
    """As published drafters are: blocks of 16, and a window in the first layer."""
    return module_for(model, "published", block_size=16)


def published_folder(folder, model, change=lambda config, tensors: None):
    """A random checkpoint in the published layout."""
    module = published_module(model)
    text = model.config
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "num_target_layers": text.num_hidden_layers,
        "num_hidden_layers": 2,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "block_size": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 20,
        "dflash_config": {
            "mask_token_id": 95,
            "target_layer_ids": [k - 1 for k in module.config.layer_ids],
        },
    }
    tensors = {name: t.clone() for name, t in module.state_dict().items()}
    change(config, tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return module


def published(tmp_path, model):
    """The checkpoint that ``published_folder`` wrote, and its target."""
    return read_checkpoint(tmp_path / "published"), table_of(tmp_path, model)


def table_of(folder, model):
    """The target as formats see it."""
    embed_VH = model.get_input_embeddings().weight.detach()
    return TargetTable("target", folder, model.config, (), embed_VH)


@pytest.mark.parametrize(
    ("flags", "causal"),
    [({}, (True, False)), ({"is_causal": False}, (False, False)), ({"causal": True}, (True, True))],
)
def test_flags_of_causality_are_read_and_sliding_layers_are_causal_without(tmp_path, flags, causal):
    model = random_model("qwen3")
    published_folder(tmp_path / "published", model, lambda c, t: c.update(flags))

    assert from_published(*published(tmp_path, model)).config["causal"] == list(causal)


def test_a_published_checkpoint_is_read(tmp_path):
    model = random_model("qwen3")
    module = published_folder(tmp_path / "published", model)

    found = from_published(*published(tmp_path, model))

    assert found.config == module.config.to_json()
    LEARNS.check(found.config, found.tensors)
    assert all(torch.equal(found.tensors[n], t) for n, t in module.state_dict().items())


@pytest.mark.parametrize(
    ("windows", "causal"),
    [
        ((None, None), (False, False)),
        ((None, None), (True, True)),
        ((20, None), (True, False)),
        ((20, 20), (False, False)),
    ],
)
def test_what_is_exported_is_read_back(tmp_path, windows, causal):
    model = random_model("qwen3")
    module = published_module(model)
    config = replace(module.config, windows=windows, causal=causal).to_json()
    target = table_of(tmp_path, model)

    write_checkpoint(tmp_path / "out", *to_published(config, module.state_dict(), target))

    found = from_published(read_checkpoint(tmp_path / "out"), target)
    assert found.config == config
    assert all(torch.equal(found.tensors[n], t) for n, t in module.state_dict().items())


@pytest.mark.parametrize(
    ("windows", "causal"),
    [
        ((None, None), (False, False)),
        ((20, None), (True, False)),
        ((20, 20), (False, False)),
    ],
)
def test_the_layout_of_speculators_is_read_back(tmp_path, windows, causal):
    model = random_model("qwen3")
    module = published_module(model)
    own = replace(module.config, windows=windows, causal=causal).to_json()
    target = table_of(tmp_path, model)

    config, tensors = to_speculators(own, module.state_dict(), target)

    assert config["aux_hidden_state_layer_ids"] == own["layer_ids"]
    assert config["sliding_window_non_causal"] == (windows == (20, 20))
    # The library writes this architecture, and the table.
    config = {**config, "architectures": ["DFlashDraftModel"]}
    for table in (target.embed_VH, -target.embed_VH):
        write_checkpoint(tmp_path / "out", config, {**tensors, "embed_tokens.weight": table})
        checkpoint = read_checkpoint(tmp_path / "out")
        if table is target.embed_VH:
            found = read_drafter(checkpoint, target)
            assert (found.kind, found.config) == ("dflash", own)
            assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())
        else:
            with pytest.raises(FormatError, match=r"embed_tokens.weight is not the target's"):
                read_drafter(checkpoint, target)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": (True, True)}, "no window is causal, which the layout cannot say"),
        ({"windows": (20, 20), "causal": (True, False)}, "some are not, which the layout cannot"),
        ({"windows": (20, 30), "causal": (True, True)}, r"windows of \[20, 30\]"),
    ],
)
def test_masks_that_speculators_cannot_say_are_not_exported(tmp_path, changed, message):
    model = random_model("qwen3")
    module = published_module(model)
    target = table_of(tmp_path, model)

    with pytest.raises(ValueError, match=message):
        to_speculators(replace(module.config, **changed).to_json(), module.state_dict(), target)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_ids": (0, 2)}, "embeddings, which the layout cannot name"),
        ({"windows": (20, 30), "causal": (True, True)}, r"windows of \[20, 30\]"),
        ({"windows": (20, 20), "causal": (True, False)}, "not exactly those with a window"),
    ],
)
def test_what_the_layout_cannot_say_is_not_exported(tmp_path, changed, message):
    model = random_model("qwen3")
    module = published_module(model)
    target = table_of(tmp_path, model)

    with pytest.raises(ValueError, match=message):
        to_published(replace(module.config, **changed).to_json(), module.state_dict(), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda c, t: t.update(extra=torch.zeros(1)), "extra is not a tensor of DFlash"),
        (
            lambda c, t: t.update({"norm.weight": torch.zeros(7)}),
            r"norm\.weight has the shape \[7\], expected \[48\]",
        ),
        (lambda c, t: c.pop("rms_norm_eps"), "has no rms_norm_eps"),
        (lambda c, t: c["dflash_config"].pop("mask_token_id"), "has no mask_token_id"),
        (
            lambda c, t: c.update(hidden_size=64),
            "hidden_size is 64 and vocab_size 96, but the target has 48 and 96",
        ),
        (lambda c, t: c.update(rope_scaling={"type": "yarn"}), "the rule 'yarn' of rope_scaling"),
        (
            lambda c, t: c.update(layer_types=["full_attention"]),
            "layer_types has 1 entries for 2 layers",
        ),
        (lambda c, t: c.update(layer_types=["chunked"] * 2), "layer_types holds 'chunked'"),
        (
            lambda c, t: c["dflash_config"].update(attention_sink_bias=True),
            "attention_sink_bias is True, which is not computed",
        ),
        (lambda c, t: c.update(sliding_window=8), "sliding_window is 8 for blocks of 16"),
        (
            lambda c, t: c.update(num_target_layers=5),
            "num_target_layers is 5, but the target has 4",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_first_thing(tmp_path, change, message):
    model = random_model("qwen3")
    published_folder(tmp_path / "published", model, change)

    with pytest.raises(FormatError, match=message):
        from_published(*published(tmp_path, model))
