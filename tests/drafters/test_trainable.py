"""A trainer obtains every drafter that learns by its kind, and nothing else of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from buffer.records import Trace
from configs.schema import DrafterSettings
from drafters.acceptance import simulated_tokens_per_step
from drafters.batch import collate
from drafters.catalog import kind_of
from drafters.protocol import DrafterContext, Weights
from drafters.samples import Sample
from drafters.trainable import learning_kinds, trainable
from oracles.support import REPOSITORY
from targets.head import load_target_head
from targets.target import Target
from tests.trainer.traffic import (
    HIDDEN,
    LAYER_IDS,
    LAYERS,
    VOCAB,
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
)
from trainer.dataset import Expected, sample_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return folder, save_target(folder), load_target_head(folder, CPU, torch.float32)


def taps_of(kind) -> tuple[int, ...]:
    """Layers that a new drafter of the kind is made to read."""
    return {"mtp": (LAYERS,)}.get(kind, LAYER_IDS)


def samples(model, folder, layer_ids) -> list[Sample]:
    fingerprint = fingerprint_of(folder)
    traces: list[Trace] = make_traces(model, fingerprint, 4, layer_ids=layer_ids)
    expected = Expected(fingerprint, layer_ids, HIDDEN, VOCAB)
    found = [sample_of(trace, expected, 64) for trace in traces]
    return [sample for sample in found if isinstance(sample, Sample)]


def new_model(learns, head, seed=0):
    return learns.new_model(head.config, head.lm_head.weight_VH, taps_of(learns.kind), seed)


@pytest.mark.parametrize("kind", learning_kinds())
def test_what_a_bundle_holds_makes_the_same_model(head, kind):
    learns, target_head = trainable(kind), head[2]
    model = new_model(learns, target_head)
    config, tensors = learns.config_to_json(model), learns.bundle_tensors(model)

    loaded = learns.load_model(config, {name: t.bfloat16() for name, t in tensors.items()})

    assert learns.kind == kind
    assert learns.target_shape(config) == (VOCAB, HIDDEN, taps_of(kind))
    for name, tensor in learns.bundle_tensors(loaded).items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(tensors[name].bfloat16().float()), name


@pytest.mark.parametrize("kind", learning_kinds())
def test_updates_on_one_batch_raise_simulated_tokens_per_step(head, kind):
    learns, (folder, model, target_head) = trainable(kind), head
    drafter = new_model(learns, target_head)
    parts = [
        (sample, piece)
        for sample in samples(model, folder, taps_of(kind))
        for piece in sample.pieces
    ]
    batch = collate(parts)
    settings = settings_for(folder, folder).trainer
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def tokens_per_step():
        alphas, _, is_full = learns.acceptance(drafter, target_head, batch, 3)
        assert set(batch.segment_T[batch.row_R[is_full]].tolist()) == set(range(len(parts)))
        return simulated_tokens_per_step(alphas[is_full], 3)

    before = tokens_per_step()
    losses = []
    for _ in range(70):
        optimizer.zero_grad()
        computed = learns.loss(drafter, target_head, batch, settings, generator)
        computed.loss.backward()
        optimizer.step()
        losses.append(float(computed.loss.detach()))

    assert losses[-1] < 0.6 * losses[0]
    assert tokens_per_step() > before + 0.5
    assert len(batch.row_R) == sum(sample.num_loss_rows for sample, _ in parts)
    assert computed.alpha_K.shape == computed.agree_K.shape == (settings.ttt_steps,)


@pytest.mark.parametrize(
    ("kind", "layer_ids"),
    [
        (kind, layer_ids)
        for kind in learning_kinds()
        for layer_ids in ((LAYERS + 1,), (-1,), ())
        if layer_ids or kind != "draft_model"  # which reads none
    ],
)
def test_layers_that_the_target_does_not_have_are_refused_by_the_setting(head, kind, layer_ids):
    *_, target = head

    with pytest.raises(ValueError, match=r"drafter\.layer_ids must be "):
        trainable(kind).new_model(target.config, target.lm_head.weight_VH, layer_ids, 0)


@pytest.mark.parametrize("kind", learning_kinds())
def test_missing_tensors_are_refused(head, kind):
    learns = trainable(kind)
    model = new_model(learns, head[2])
    tensors = learns.bundle_tensors(model)
    missing = sorted(tensors)[0]
    del tensors[missing]

    with pytest.raises(ValueError, match=f"(?s)do not fit their config.*{missing}"):
        learns.check(learns.config_to_json(model), tensors)


@pytest.mark.parametrize("change", [{"hidden_size": 2 * HIDDEN}, {"vocab_size": VOCAB + 1}])
@pytest.mark.parametrize("kind", learning_kinds())
def test_weights_for_a_target_of_another_shape_do_not_serve(head, kind, change):
    learns, (_, model, target_head) = trainable(kind), head
    drafter = new_model(learns, target_head)
    target = Target(model, ())
    context = DrafterContext(
        settings=DrafterSettings(kind=kind),
        embed=target.embed,
        lm_head=target.lm_head,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_slots=32,
        logits=target.logits,
        device=CPU,
        dtype=torch.float32,
        weights=Weights(3, learns.config_to_json(drafter), learns.bundle_tensors(drafter)),
    )
    assert kind_of(kind).build(context).version == 3

    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        kind_of(kind).build(replace(context, **change))


@pytest.mark.parametrize("kind", ["suffix", "none"])
def test_a_kind_that_does_not_learn_is_an_error_that_names_those_that_do(kind):
    with pytest.raises(ValueError, match=f"kind '{kind}' cannot be trained; .*eagle3"):
        trainable(kind)


def test_asking_which_kinds_learn_imports_no_torch():
    code = (
        "import sys; from drafters.trainable import learning_kinds; learning_kinds(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
