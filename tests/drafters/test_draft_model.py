"""A smaller causal LM drafts: the target's first layers, a folder or a GGUF file."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from buffer.bundles import read_bundle
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from configs.checks import check_settings
from configs.schema import Settings
from drafters.cli import app
from drafters.draft_model.trainable import DraftModelTrainable, row_hidden
from drafters.initial import new_drafter
from drafters.protocol import Weights
from oracles.bundle_folders import write_bundle
from oracles.engines import make_engine, new_weights, random_model, request_of, run
from oracles.gguf_files import random_source, write_gguf
from oracles.support import tiny_tokenizer
from policies.fixed import FixedPolicy
from serving.build import build_service
from serving.swap.flat_weights import FlatWeights
from specops.attention import DecodePass
from specops.device import places_of
from targets.causal import CausalWeights, config_json, make_causal, read_causal
from targets.fused import FusedDecoder
from targets.target import Target
from tests.serving.capture.test_capture import PROMPT, traces_of
from tests.serving.engine.test_serving_equals_training import drafted_batch
from tests.serving.swap.test_swaps import ask, noisy, publish_next, wait_until
from tests.trainer.traffic import (
    LAYER_IDS,
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
    write_traces,
)
from trainer.build import build_trainer
from trainer.loop import run as run_trainer

LEARNS = DraftModelTrainable()
CPU = torch.device("cpu")


def weights_of(model, causal) -> Weights:
    """A drafter that begins as ``causal``, for ``model`` as target."""
    made = LEARNS.new_model(model.config, model.lm_head.weight, None, 0, causal=causal)
    return Weights(0, LEARNS.config_to_json(made), LEARNS.bundle_tensors(made))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3"])
def test_draft_logits_of_serving_and_training_are_equal(monkeypatch, architecture):
    model = random_model(architecture)
    weights = new_weights("draft_model", model)
    engine = make_engine(
        model, kind="draft_model", weights=weights, policy=FixedPolicy("draft_model", 4),
        suffix=False, prefill_chunk=7,
    )  # fmt: skip
    drafter = engine.drafting.neural["draft_model"].drafter
    seen, propose = [], drafter.propose

    def keep(outputs, at, num_draft, choose):
        def kept(logits, number):
            seen.append(logits[0].clone())
            return choose(logits, number)

        return propose(outputs, at, num_draft, kept)

    monkeypatch.setattr(drafter, "propose", keep)
    trace = traces_of(engine, [request_of("a", PROMPT, 40)])[0]["a"]
    module = LEARNS.load_model(weights.config, weights.tensors)

    compared = passes = 0
    for one in trace.rounds:
        num_draft = len(one.draft_ids)
        if num_draft:
            batch = drafted_batch(trace, one)
            at = one.anchor + torch.arange(num_draft)
            with torch.no_grad():
                want = row_hidden(module, batch)[torch.isin(batch.row_R, at)]
                want = want @ module.lm.lm_head.weight.T
            for step in range(num_draft):
                torch.testing.assert_close(seen[passes + step], want[step], atol=1e-4, rtol=0)
            compared += num_draft
        passes += one.draft_k if num_draft else 0
    assert compared >= 60


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_itself_as_drafter_is_always_right(tmp_path, temperature):
    """Rows from position 0 on, positions and pages: any slip would cost a token."""
    model = random_model("qwen3")
    model.save_pretrained(tmp_path)
    engine = make_engine(
        model, kind="draft_model", weights=weights_of(model, read_causal(tmp_path)),
        policy=FixedPolicy("draft_model", 4), suffix=False, prefill_chunk=7,
    )  # fmt: skip

    prompts = [list(range(i, i + 3 + 9 * i)) for i in range(5)]
    run(engine, [request_of(str(i), p, 30, temperature=temperature) for i, p in enumerate(prompts)])

    figures = engine.figures()
    assert figures.num_draft_tokens > 100
    assert figures.num_accepted_tokens == figures.num_draft_tokens


def test_the_first_layers_are_those_of_the_target(tmp_path):
    model = random_model("gemma3")
    model.save_pretrained(tmp_path)
    found = read_causal(tmp_path, 2)
    made = make_causal(found.config, found.tensors, torch.float32, CPU)
    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:2]
    shorter.config.num_hidden_layers = 2
    ids = torch.arange(12)[None]

    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, shorter(ids, use_cache=False).logits)
    assert not made.config.tie_word_embeddings
    with pytest.raises(ValueError, match="a model of 4 layers has no first 5"):
        read_causal(tmp_path, 5)


@pytest.mark.parametrize("vocab_size", [80, 112])
def test_vocabularies_may_be_padded_to_other_sizes(vocab_size):
    model, other = random_model("qwen3"), random_model("llama", vocab_size=vocab_size)
    weights = weights_of(model, CausalWeights(config_json(other.config), dict(other.state_dict())))
    plain = copy.deepcopy(model)
    engine = make_engine(model, kind="draft_model", weights=weights, suffix=False)

    sampled = request_of("warm", [3, 4, 5], 30, temperature=1.0)
    got = run(engine, [request_of("cold", [1, 2, 3], 30), sampled])

    with torch.no_grad():
        wanted = plain.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=30, do_sample=False)
    assert got["cold"].token_ids == wanted[0, 3:].tolist()
    assert engine.figures().num_draft_tokens > 20


def test_weights_that_swaps_overwrite_are_fused_in_place():
    model, plain = (random_model("qwen3", head_dim=16) for _ in range(2))
    flat = FlatWeights(model)
    model.config._attn_implementation = "eager"
    at = DecodePass(torch.tensor([[1, 2, 3]], dtype=torch.int32), torch.zeros(1).int(), 4)
    places, ids = places_of(at, 9), torch.arange(9) + 20

    class Own(Target):
        """Keeps its weights where they are, as on a GPU."""

        def __init__(self, model):
            self.model, self.layer_ids = model.requires_grad_(False), ()
            self.config, self.lm_head = model.config, model.lm_head
            self.device, self.dtype = CPU, torch.float32
            self._fused = FusedDecoder(model, 64, in_place=True)

    target = Own(model)

    def served():
        pool = target.make_pool(16)
        rows = target.decode(ids, places.positions.flatten(), places.slots.flatten(), at, pool)
        return target.logits(rows.hidden_TH)

    with torch.no_grad():
        torch.testing.assert_close(served(), plain(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
        news = {n: t + 0.05 * torch.randn_like(t) for n, t in plain.state_dict().items()}
        flat.take_over(flat.stage(news))
        plain.load_state_dict(news)
        torch.testing.assert_close(served(), plain(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_would_copy_weights_leaves_them_where_they_are():
    target = Target(random_model("qwen3", head_dim=16), ())  # by columns, each for itself
    flat = FlatWeights(target.model)
    before = [p.data_ptr() for p in target.model.parameters()]

    assert "would be copied, which swaps do not reach" in target.fuse(64, in_place=True)

    assert [p.data_ptr() for p in target.model.parameters()] == before
    assert not target.is_fused and flat.flat.data_ptr() == before[0]


def run_settings(target, run_dir, kind="draft_model", **drafter):
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "target_cache": run_dir / "cache",
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 200, "page_size": 4},
            "drafter": {"kind": kind, "max_draft": 4, **drafter},
            "policy": {"kind": "fixed", "drafter": kind, "draft_k": 3},
            "swap": {"poll_s": 0.02},
        }
    )


def test_a_gguf_file_drafts_and_its_versions_are_swapped(tiny_target_dir, tmp_path):
    source = random_source("llama")
    file = write_gguf(tmp_path / "small.gguf", source)
    service = build_service(run_settings(tiny_target_dir, tmp_path, model=str(file)))
    service.start()
    try:
        before = ask(service, "before")
        publish_next(tmp_path / "weights", noisy)
        wait_until(lambda: service.drafter_status()["version"] == 1)
        after = ask(service, "after")
    finally:
        service.stop()

    stored = load(FolderWeights(tmp_path / "weights").read(0).files[TENSORS])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[f"lm.{down}"].float(), source.state_dict()[down])
    assert after.token_ids == before.token_ids
    assert (before.last.stats.drafter_version, after.last.stats.drafter_version) == (0, 1)
    assert after.last.stats.proposed > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_is_exported_is_a_model_that_transformers_loads_with_equal_logits(
    tmp_path, architecture
):
    target = tmp_path / "target"
    model = random_model("qwen3", vocab_size=288)
    model.save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    other = random_model(architecture, vocab_size=288)
    began = CausalWeights(config_json(other.config), {
        "lm_head.weight": other.lm_head.weight, **other.state_dict(),
    })  # fmt: skip
    weights = weights_of(model, began)
    learnt = {name: t + 0.05 * torch.randn_like(t) for name, t in weights.tensors.items()}
    write_bundle(tmp_path / "4", "draft_model", weights.config, fingerprint_of(target), learnt)
    settings = ("--set", f"target={target}", "--format", "hf")

    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "4"), "--to", str(tmp_path / "out"), *settings]
    )

    assert done.exit_code == 0, done.output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = LEARNS.load_model(weights.config, learnt).lm
    ours.set_attn_implementation("sdpa")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
    assert loaded.dtype == torch.float32 and type(loaded) is type(other)
    # A run can begin with it: its tokenizer is the target's, and its tensors are those learnt.
    source = new_drafter(run_settings(target, tmp_path, model=str(tmp_path / "out"))).causal
    again = read_causal(source.folder)
    assert {f"lm.{name}" for name in again.tensors} == set(learnt)
    assert all(torch.equal(again.tensors[name[3:]], tensor) for name, tensor in learnt.items())
    assert again.config == weights.config["causal"]


def test_a_model_that_cannot_draft_is_refused_by_its_setting(tiny_target_dir, tmp_path):
    folder = tmp_path / "other"
    random_model("llama", vocab_size=288).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content))

    with pytest.raises(
        ValueError, match=rf"tokenizer of {folder} is not the target's: id \d+ is '"
    ):
        new_drafter(run_settings(tiny_target_dir, tmp_path, model=str(folder)))
    with pytest.raises(ValueError, match=r"drafter\.model cannot be used: .*nowhere"):
        new_drafter(run_settings(tiny_target_dir, tmp_path, model="./nowhere"))
    with pytest.raises(ValueError, match=r"draft_model\.target_layers is 5, but .* has 4 layers"):
        new_drafter(run_settings(tiny_target_dir, tmp_path, draft_model={"target_layers": 5}))
    wrong = run_settings(tiny_target_dir, tmp_path, kind="suffix", model="x")
    assert any("drafter.model is set" in problem for problem in check_settings(wrong))


def test_a_trainer_publishes_what_it_learns_and_continues_from_its_checkpoint(tmp_path):
    target = tmp_path / "target"
    model = save_target(target)
    write_traces(tmp_path / "run", make_traces(model, fingerprint_of(target), 40))
    base = settings_for(tmp_path / "run", target, max_steps=30, gate_confidence=0.5)
    drafter = base.drafter.model_copy(update={"kind": "draft_model", "layer_ids": LAYER_IDS})
    settings = base.model_copy(update={"drafter": drafter})

    run_trainer(build_trainer(settings, threading.Event()))

    again = build_trainer(settings, threading.Event())
    versions = FolderWeights(tmp_path / "run" / "weights").versions()
    assert again.learner.step == 30
    assert len(versions) > 1
    newest = read_bundle(tmp_path / "run" / "weights" / str(versions[-1]))
    gate = newest.manifest.gate
    assert gate["candidate"] > gate["incumbent"]
    first = load(read_bundle(tmp_path / "run" / "weights" / "0").files[TENSORS])
    assert torch.equal(
        first["lm.model.layers.0.self_attn.q_proj.weight"],
        model.model.layers[0].self_attn.q_proj.weight,
    )
