"""P-EAGLE drafts all its tokens in one pass: serving equals training, depths see what they should,
and published layouts are read, written or refused by name."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from buffer.bundles import read_bundle
from buffer.manifest import TENSORS
from drafters.cli import app
from drafters.eagle3.training import ChainPlan, _GrowingAttention, ttt_loss
from drafters.formats.published import LAYOUTS
from drafters.p_eagle import PEagle, PEagleConfig
from drafters.p_eagle_learning import PEagleTrainable, parallel_outputs
from drafters.protocol import Weights
from oracles.bundle_folders import write_bundle
from oracles.engines import make_engine, random_model, request_of
from policies.fixed import FixedPolicy
from targets.last_layer import load_last_layer
from tests.drafters.eagle3.test_training import (
    EMBED,
    VOCAB,
    every_place,
    head,
    make_batch,
    make_model,
    piece_of,
)
from tests.serving.capture.test_capture import PROMPT, traces_of
from tests.serving.engine.test_every_drafter import trained_on
from tests.trainer.traffic import fingerprint_of, save_target

LEARNS = PEagleTrainable()
STEPS = 4


def parallel_model(num_layers=3, draft_vocab=VOCAB, dtype=torch.float64) -> PEagle:
    """Random weights, those of the further layers included."""
    first = make_model(draft_vocab).config
    model = PEagle(PEagleConfig(first, num_layers, VOCAB - 1))
    model.initialise(seed=3)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.16)
    if model.d2t is not None:
        model.d2t += torch.arange(draft_vocab)
    return model.to(dtype)


@torch.no_grad()
def one_by_one(model, batch, number, anchor):
    """The definition: rows in order, each over all keys so far; those behind the anchor are masks.

    Returns:
        Outputs [STEPS, H] of the anchor's row and the masks behind it.
    """
    own = piece_of(batch, number)
    ids, features, known = batch.token_ids_T[own], batch.features_TF[own], batch.known_T[own]
    attends = [_GrowingAttention() for _ in range(model.parallel.num_layers)]
    outputs = []
    for p in range(1, anchor + STEPS):
        if p <= anchor and not known[p - 1]:
            continue
        embed, hidden = model.masked()
        if p <= anchor:
            embed, hidden = EMBED[ids[p]], model.fuse(features[p - 1])
        rope = model.rope(torch.tensor(p))
        outputs.append(model.run(embed, hidden, *rope, lambda i, q, k, v: attends[i](q, k, v)))
    return torch.stack(outputs[-STEPS:])


@pytest.mark.parametrize("unknown", [(), (0, 1, 2), (5,)], ids=["all known", "prefix", "gap"])
def test_every_depth_has_the_outputs_of_drafting_in_order(unknown):
    model, batch = parallel_model(), make_batch((14, 11), unknown=unknown)

    depths = list(parallel_outputs(model, EMBED, batch, every_place(batch), STEPS))

    compared = 0
    for number in range(2):
        own = piece_of(batch, number)
        for anchor in range(1, own.stop - own.start - STEPS):
            if not batch.known_T[own][anchor - 1]:
                continue
            trained = torch.stack([g[own.start + anchor] for g in depths])
            want = one_by_one(model, batch, number, anchor)
            torch.testing.assert_close(trained, want, rtol=1e-6, atol=1e-6)
            compared += 1
    assert compared >= 8


def test_depths_see_neither_tokens_nor_features_behind_the_anchor():
    model, batch = parallel_model(), make_batch((12,))
    anchor = torch.tensor([6])
    features = batch.features_TF.clone().requires_grad_()
    seen = replace(batch, features_TF=features)
    changed = batch.token_ids_T.clone()
    changed[7:] = (changed[7:] + 1) % VOCAB

    outputs = list(parallel_outputs(model, EMBED, seen, anchor, STEPS))
    others = list(parallel_outputs(model, EMBED, replace(seen, token_ids_T=changed), anchor, STEPS))

    for output, other in zip(outputs[1:], others[1:], strict=True):
        (slope,) = torch.autograd.grad(output.sum(), features, retain_graph=True)
        assert slope.abs().sum(-1).nonzero()[:, 0].tolist() == list(range(6))
        assert output.equal(other)


@pytest.mark.parametrize("keep", [True, False])
def test_everything_learns_through_the_loss_and_padding_changes_nothing(keep):
    model, batch = parallel_model(draft_vocab=11), make_batch((12, 9))
    plan = ChainPlan(3, chain_share=0.7, keep_logits=keep)

    draw = torch.Generator().manual_seed(3)
    found = ttt_loss(model, EMBED, head(batch), batch, plan, draw, parallel_outputs)
    found.loss.backward()

    assert found.alpha_K.shape == (3,)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("num_draft", [1, 4])
def test_draft_logits_of_serving_and_training_are_equal(monkeypatch, num_draft, fused):
    model = random_model("qwen3", head_dim=16)
    given = LEARNS.new_model(model.config, model.lm_head.weight.detach(), None, 1)
    module = PEagle(PEagleConfig(given.config, 2, 95))
    module.initialise(3)
    with torch.no_grad():
        for parameter in module.rest.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    weights = Weights(0, LEARNS.config_to_json(module), LEARNS.bundle_tensors(module))
    engine = make_engine(
        model, kind="p_eagle", weights=weights, policy=FixedPolicy("p_eagle", num_draft),
        suffix=False, prefill_chunk=7, fused_drafter=fused,
    )  # fmt: skip
    drafter = engine.drafting.neural["p_eagle"].drafter
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
    batch, embed = trained_on(trace), model.get_input_embeddings().weight
    with torch.no_grad():
        depths = parallel_outputs(module, embed, batch, batch.row_R, num_draft)
        logits = [module.logits(g[batch.row_R] if k == 0 else g) for k, g in enumerate(depths)]
    row_of = {int(p): r for r, p in enumerate(batch.row_R)}

    compared = passes = 0
    for one in trace.rounds:
        if one.anchor in row_of and len(one.draft_ids) == num_draft:
            for step in range(num_draft):
                want = logits[step][row_of[one.anchor]]
                torch.testing.assert_close(seen[passes + step], want, atol=1e-4, rtol=0)
                compared += 1
        passes += one.draft_k if one.draft_ids else 0
    assert compared >= 20


def test_a_new_drafter_begins_as_the_targets_last_layer_alone(tmp_path):
    target = save_target(tmp_path)
    head_VH = target.get_output_embeddings().weight.detach()
    deep = copy.deepcopy(target.config)
    deep.num_hidden_layers = 12
    model = LEARNS.new_model(deep, head_VH, None, 0, last_layer=load_last_layer(tmp_path))

    stream = torch.randn(3, model.config.hidden_size)
    rope = model.rope(torch.arange(3))
    assert len(model.rest) == 2
    for layer in model.rest:
        assert layer(stream, *rope, lambda q, k, v: v.repeat(1, q.shape[1] // v.shape[1], 1)).equal(
            stream
        )
    assert model.fc.weight[:, -model.config.hidden_size :].equal(torch.eye(len(model.fc.weight)))


# ---- layouts -----------------------------------------------------------------------------------


def drafter_for(model, reduced=False, dtype=torch.bfloat16):
    ids = torch.arange(3, 83, 2) if reduced else None
    given = LEARNS.new_model(
        model.config, model.get_output_embeddings().weight.detach(), None, 2, ids
    )
    drafter = PEagle(PEagleConfig(given.config, 3, 90))
    drafter.load_state_dict({**drafter.state_dict(), **given.state_dict()}, strict=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    return drafter.requires_grad_(False).to(dtype)


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def exported(target, folder, layout, drafter):
    """Write the drafter's bundle to FOLDER/7, and what the command makes of it to FOLDER/out."""
    write_bundle(
        folder / "7", "p_eagle", LEARNS.config_to_json(drafter), fingerprint_of(target),
        drafter.bundle_tensors(),
    )  # fmt: skip
    done = command(
        "export", folder / "7", "--to", folder / "out", "--format", layout,
        "--set", f"target={target}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return json.loads((folder / "out/config.json").read_text())


@pytest.mark.parametrize("reduced", [False, True], ids=["whole vocabulary", "reduced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_gives_the_same_bytes(target, tmp_path, layout, reduced):
    folder, model = target
    drafter = drafter_for(model, reduced)
    config = exported(folder, tmp_path, layout, drafter)

    back = command(
        "import", tmp_path / "out", "--to", tmp_path / "back", "--set", f"target={folder}"
    )

    assert back.exit_code == 0, back.output
    bundle = read_bundle(tmp_path / "back/0")
    assert bundle.manifest.kind == "p_eagle"
    assert bundle.manifest.drafter_config == LEARNS.config_to_json(drafter)
    assert bundle.files[TENSORS] == read_bundle(tmp_path / "7").files[TENSORS]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors["mask_hidden"].shape == (1, 1, len(drafter.config.layer_ids) * 32)
    assert tensors["layers.2.self_attn.q_proj.weight"].shape[1] == 32
    assert tensors["embed_tokens.weight"][90].equal(drafter.mask_embed)
    first = "layers.0" if layout == "speculators" else "midlayer"
    assert tensors[f"{first}.self_attn.q_proj.weight"].shape[1] == 64
    assert config["mask_token_id"] == 90
    if layout == "speculators":
        assert config["architectures"] == ["PEagleSpeculator"]
        assert config["transformer_layer_config"]["num_hidden_layers"] == 3
    else:
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert (config["num_hidden_layers"], config["ptd_token_id"]) == (3, 90)


def other_row(config, tensors):
    tensors["embed_tokens.weight"][5] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: t.pop("layers.1.mlp.up_proj.weight"),
            r"layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        (
            lambda c, t: t.update({"layers.2.self_attn.q_norm.weight": torch.zeros(1)}),
            r"layers\.2\.self_attn\.q_norm\.weight is not a tensor of P-EAGLE",
        ),
        (
            lambda c, t: t.update(mask_hidden=torch.zeros(1, 1, 7)),
            r"mask_hidden has the shape \[1, 1, 7\]",
        ),
        (
            lambda c, t: [c.pop(n) for n in ("mask_token_id", "ptd_token_id", "pard_token")],
            "must name a mask token of the target's 96",
        ),
        (lambda c, t: c.update(mask_token_id=96), "must name a mask token of the target's 96"),
        (other_row, "embed_tokens.weight is not the target's table"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_first_thing(
    target, tmp_path, change, message
):
    folder, model = target
    config = exported(folder, tmp_path, "hf", drafter_for(model))
    tensors = load_file(tmp_path / "out/model.safetensors")
    change(config, tensors)
    save_file(tensors, tmp_path / "out/model.safetensors")
    (tmp_path / "out/config.json").write_text(json.dumps(config))

    refused = command(
        "import", tmp_path / "out", "--to", tmp_path / "back", "--set", f"target={folder}"
    )

    assert refused.exit_code == 1
    assert re.search(message, refused.output), refused.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"mask_token_id": 23}, "none of the target's 23 tokens"),
        ({"num_layers": None}, "not a P-EAGLE config"),
        ({"norm_output": True}, "norm_output"),
        ({"other": 1}, "not an EAGLE-3 config"),
    ],
)
def test_an_impossible_config_is_refused(change, message):
    config = parallel_model().parallel.to_json()

    assert PEagleConfig.from_json(config).to_json() == config
    with pytest.raises(ValueError, match=message):
        PEagleConfig.from_json(config | change)
