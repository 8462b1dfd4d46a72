"""An objective is what its formula says for every drafter, whichever way it is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.choices import SettingsError
from configs.schema import TrainerSettings
from drafters.batch import collate
from drafters.eagle3.training import ChainPlan, ttt_loss, ttt_outputs
from drafters.objectives import (
    CATALOG,
    Objective,
    objective_of,
    position_weights,
    shares,
)
from drafters.trainable import learning_kinds, trainable
from specops.distill import row_loss
from targets.head import load_target_head
from tests.drafters.eagle3.test_training import (
    EMBED,
    VOCAB,
    every_place,
    head,
    make_batch,
    make_model,
)
from tests.drafters.test_trainable import CPU, new_model, samples, taps_of
from tests.trainer.traffic import save_target

STEPS = 2


def rejected_rows(batch):
    """Some rows weigh more, as those where a draft was rejected."""
    weights = torch.ones(len(batch.row_R))
    weights[2::5] = 1.5
    weights[4::5] = 2.0
    return replace(batch, weight_R=weights)


def by_definition(model, batch, objective):
    """The loss of a batch, chain by chain and row by row."""
    steps = list(ttt_outputs(model, EMBED, batch, every_place(batch), STEPS))
    draft_ids = model.to_target_ids(torch.arange(model.config.draft_vocab_size))
    probs = head(batch).logits(batch.last_hidden_RH).softmax(-1)[:, draft_ids]
    rows = batch.row_R.tolist()
    total = mass = torch.zeros((), dtype=torch.float64)
    for first, place in enumerate(rows):
        survival, weights, losses = 1.0, [], []
        for k in range(STEPS):
            at = first + k
            if at >= len(rows) or rows[at] != place + k:
                break
            logits = model.logits(steps[k][place])
            q = torch.zeros(VOCAB, dtype=torch.float64)
            q[draft_ids] = logits.detach().softmax(-1)
            survival *= 0.5 * float(q[batch.token_ids_T[rows[at] + 1]]) + 0.5
            weights.append(survival)
            own = row_loss(objective.loss, probs[at], logits)
            excess = batch.weight_R[at].double() - 1
            if objective.rejected is None:
                losses.append((own * (1 + excess), 1 + excess))
            else:
                more = row_loss(objective.rejected, probs[at], logits)
                losses.append((own + excess * more, 1.0))
        for k, (loss, share) in enumerate(losses):
            weight = 1.0 if objective.positions == "equal" else sum(weights[k:])
            total, mass = total + weight * loss, mass + weight * share
    return total / mass


@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
@pytest.mark.parametrize("name", CATALOG)
def test_an_objective_is_the_mean_that_its_formula_says(name, draft_vocab):
    """Loss and gradients, with and without keeping logits, against autograd."""
    model, batch = make_model(draft_vocab), rejected_rows(make_batch((8, 6), unknown=(3,)))
    objective = CATALOG[name]
    want = by_definition(model, batch, objective)
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(want, list(parameters.values()))

    for keep in (True, False):
        plan = ChainPlan(STEPS, objective, keep_logits=keep, chunk_rows=4)
        found = ttt_loss(model, EMBED, head(batch), batch, plan)

        torch.testing.assert_close(found.loss, want.detach())
        own = torch.autograd.grad(found.loss, list(parameters.values()))
        for parameter, slope, expected in zip(parameters, own, slopes, strict=True):
            torch.testing.assert_close(slope, expected, msg=lambda m, n=parameter: f"{n}: {m}")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return folder, save_target(folder), load_target_head(folder, CPU, torch.float32)


@pytest.mark.parametrize("kind", learning_kinds())
def test_every_drafter_takes_every_objective(target, kind):
    """What is added at rejected rows is added where rows weigh more, and only there."""
    folder, model, target_head = target
    learns = trainable(kind)
    drafter = new_model(learns, target_head)
    found = samples(model, folder, taps_of(kind))
    plain = collate([(sample, piece) for sample in found for piece in sample.pieces])
    heavy = rejected_rows(plain)

    def loss(name, batch):
        settings = TrainerSettings(loss=name, rejected_weight=1.5)
        drafter.zero_grad()
        generator = torch.Generator().manual_seed(0)
        computed = learns.loss(drafter, target_head, batch, settings, generator).loss
        computed.backward()
        assert all(p.grad.isfinite().all() for p in drafter.parameters() if p.grad is not None)
        return float(computed.detach())

    losses = {name: loss(name, plain) for name in CATALOG}
    weighted = {name: loss(name, heavy) for name in ("lk", "lk_rejected_reverse_kl")}

    assert losses["lk_rejected_reverse_kl"] == pytest.approx(losses["lk"], rel=1e-5)
    assert weighted["lk_rejected_reverse_kl"] > losses["lk"] + 0.01
    assert weighted["lk"] != pytest.approx(losses["lk"], rel=1e-6)
    assert losses["lk_equal"] != pytest.approx(losses["lk"], rel=1e-6)
    assert (losses["lk_dpace"] == losses["lk"]) == (kind != "dflash")
    assert 0 < losses["total_variation"] < 1
    assert len({losses[n] for n in ("lk", "forward_kl", "reverse_kl", "total_variation")}) == 4


def test_the_default_is_the_hybrid_as_the_drafters_authors_weigh_it():
    assert objective_of(TrainerSettings()) == Objective("lk", None, "own")


def test_an_unknown_objective_names_those_that_there_are():
    with pytest.raises(SettingsError, match=r"trainer\.loss 'lk_even' is unknown; .*lk_equal"):
        objective_of(TrainerSettings(loss="lk_even"))


def test_a_loss_at_rejected_rows_needs_a_weight():
    with pytest.raises(SettingsError, match=r"set trainer\.rejected_weight above 1"):
        objective_of(TrainerSettings(loss="lk_rejected_reverse_kl"))


def test_weights_of_rows_are_those_of_a_mean():
    place, row = torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 9.0, 1.0])

    plain = shares(Objective(), place, row)
    split = shares(Objective(rejected="reverse_kl"), place, row)

    torch.testing.assert_close(plain.loss_N, torch.tensor([2.0, 3.0, 0.0, 1.0]) / 6)
    assert plain.rejected_N is None
    torch.testing.assert_close(split.loss_N, torch.tensor([2.0, 1.0, 0.0, 1.0]) / 4)
    torch.testing.assert_close(split.rejected_N, torch.tensor([0.0, 2.0, 0.0, 0.0]) / 4)


def test_equal_weights_end_with_the_chain():
    valid = torch.tensor([[True, True], [False, True], [True, True]])

    found = position_weights("equal", torch.rand(3, 2), valid)

    assert found.equal(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
