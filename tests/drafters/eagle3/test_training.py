"""What is trained is what is served: each step has the logits a server would draft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drafters.eagle3.batch import TTTBatch
from drafters.eagle3.chains import lay_out
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.eagle3.training import (
    Objective,
    chain_acceptance,
    reference_chain_logits,
    ttt_loss,
    ttt_outputs,
    weigh,
)
from specops.distill import FrozenHead, RowFigures

HIDDEN, VOCAB, STEPS = 16, 23, 4


def make_model(draft_vocab: int = VOCAB, dtype: torch.dtype = torch.float64) -> Eagle3:
    config = Eagle3Config(
        hidden_size=HIDDEN,
        target_vocab_size=VOCAB,
        draft_vocab_size=draft_vocab,
        intermediate_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        layer_ids=(1, 2, 3),
        rms_norm_eps=1e-6,
        rope_theta=1e4,
    )
    model = Eagle3(config)
    model.initialise(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    if model.d2t is not None:
        model.d2t += torch.arange(draft_vocab)  # draft id i is target id 2 i
    return model.to(dtype)


def make_batch(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> TTTBatch:
    generator = torch.Generator().manual_seed(11)
    B, S = len(sizes), max(sizes)
    inside = torch.arange(S)[None] < torch.tensor(sizes)[:, None]
    has_label = torch.arange(S)[None] + 1 < torch.tensor(sizes)[:, None]
    return TTTBatch(
        token_ids_BS=torch.randint(0, VOCAB, (B, S), generator=generator),
        positions_BS=torch.arange(S).expand(B, S),
        features_BSF=torch.randn(B, S, 3 * HIDDEN, generator=generator).to(dtype),
        last_hidden_BSH=torch.randn(B, S, HIDDEN, generator=generator).to(dtype),
        known_BS=inside & has_label,
        loss_BS=inside & has_label,
    )


EMBED = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5)).double()
HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(6)).double()


def head(batch: TTTBatch) -> FrozenHead:
    return FrozenHead(HEAD.to(batch.features_BSF.dtype))


def with_gaps(batch: TTTBatch, unknown: list[int]) -> TTTBatch:
    known = batch.known_BS.clone()
    known[:, unknown] = False
    features = batch.features_BSF.clone()
    features[:, unknown] = 1e3  # must not matter
    return replace(batch, features_BSF=features, known_BS=known, loss_BS=batch.loss_BS & known)


def every_place(batch: TTTBatch) -> Tensor:
    """Each position an anchor."""
    return torch.arange(batch.loss_BS.shape[1]).expand(batch.loss_BS.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "unknown", [[], [0, 1, 2, 3], [5, 6]], ids=["all known", "cached prefix", "gap"]
)
def test_every_step_has_the_logits_of_the_serving_chain(dtype, unknown):  # type: ignore[no-untyped-def]
    model, batch = make_model(dtype=dtype), with_gaps(make_batch((12, 9), dtype), unknown)
    embed = EMBED.to(dtype)

    steps = [model.logits(g) for g in ttt_outputs(model, embed, batch, every_place(batch), STEPS)]

    compared = 0
    for b in range(2):
        for anchor in range(1, 12):
            length = int(batch.known_BS[b].nonzero().max()) + 2
            if not batch.known_BS[b, anchor - 1] or anchor + STEPS > length:
                continue
            chain = reference_chain_logits(
                model,
                embed,
                batch.token_ids_BS[b],
                batch.features_BSF[b],
                batch.known_BS[b],
                anchor,
                STEPS,
            )
            trained = torch.stack([steps[i][b, anchor] for i in range(STEPS)])
            torch.testing.assert_close(trained, chain, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared >= 5


def test_padding_changes_nothing() -> None:
    model, both = make_model(), make_batch((12, 9))
    alone = TTTBatch(*(getattr(both, name)[1:, :9] for name in TTTBatch.__slots__))

    padded = [g[1, :9] for g in ttt_outputs(model, EMBED, both, every_place(both), STEPS)]
    unpadded = [g[0] for g in ttt_outputs(model, EMBED, alone, every_place(alone), STEPS)]

    for step, (left, right) in enumerate(zip(padded, unpadded, strict=True)):
        inside = slice(1, 9 - step)  # chains that end within the sequence
        torch.testing.assert_close(left[inside], right[inside])


def test_absolute_position_of_a_piece_does_not_matter() -> None:
    model, batch = make_model(), make_batch((12,))
    moved = replace(batch, positions_BS=batch.positions_BS + 100)

    here = list(ttt_outputs(model, EMBED, batch, every_place(batch), STEPS))[-1]
    there = list(ttt_outputs(model, EMBED, moved, every_place(batch), STEPS))[-1]

    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)  # rope angles are float32


def test_a_chain_never_sees_features_at_or_after_its_anchor() -> None:
    model, batch = make_model(), make_batch((12,))
    features = batch.features_BSF.clone().requires_grad_()
    seen = replace(batch, features_BSF=features)

    for output in ttt_outputs(model, EMBED, seen, every_place(seen), STEPS):
        (slope,) = torch.autograd.grad(output[0, 6].sum(), features, retain_graph=True)
        reached = slope[0].abs().sum(-1).nonzero()[:, 0].tolist()
        assert reached == list(range(6))  # h of the anchor is at position 5


@pytest.mark.parametrize("kind", ["lk", "forward_kl"])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_training_on_one_batch_raises_acceptance(kind, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab, torch.float32), make_batch((12, 9), torch.float32)
    embed, objective = EMBED.float(), Objective(num_steps=3, loss=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    first = ttt_loss(model, embed, head(batch), batch, objective)

    for _ in range(60):
        optimizer.zero_grad()
        ttt_loss(model, embed, head(batch), batch, objective).loss.backward()
        optimizer.step()

    last = ttt_loss(model, embed, head(batch), batch, objective)
    assert last.loss < 0.5 * first.loss
    assert (last.alpha_K > first.alpha_K).all()


def test_gradient_of_the_whole_loss_matches_finite_differences() -> None:
    model, batch = make_model(), with_gaps(make_batch((9, 7)), [2])
    objective = Objective(num_steps=3, loss="forward_kl", floor=1.0, chunk_rows=4)
    fixed = torch.randn_like(model.fc.weight)
    fixed /= fixed.norm()

    def loss_at(shift: float) -> Tensor:
        with torch.no_grad():
            model.fc.weight.add_(fixed, alpha=shift)
        try:
            return ttt_loss(model, EMBED, head(batch), batch, objective).loss
        finally:
            with torch.no_grad():
                model.fc.weight.sub_(fixed, alpha=shift)

    loss = ttt_loss(model, EMBED, head(batch), batch, objective).loss
    loss.backward()
    assert model.fc.weight.grad is not None
    slope = (model.fc.weight.grad * fixed).sum()
    with torch.no_grad():
        numeric = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["lk", "forward_kl"])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_logits_that_are_not_kept_change_nothing(kind, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab), with_gaps(make_batch((12, 9)), [5])
    found = []

    for keep, chunk in ((True, 4), (False, 4), (False, None)):
        model.zero_grad()
        objective = Objective(3, kind, chain_share=0.7, keep_logits=keep, chunk_rows=chunk)
        draw = torch.Generator().manual_seed(3)
        result = ttt_loss(model, EMBED, head(batch), batch, objective, draw)
        result.loss.backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([result.loss.detach(), result.alpha_K, result.agree_K, *slopes])

    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_share_of_the_chains_has_the_loss_of_all_on_average() -> None:
    model, batch = make_model(), make_batch((40, 33))
    full = ttt_loss(model, EMBED, head(batch), batch, Objective(floor=1.0))
    generator = torch.Generator().manual_seed(1)
    objective = Objective(chain_share=0.5, floor=1.0)

    draws = [ttt_loss(model, EMBED, head(batch), batch, objective, generator) for _ in range(50)]

    mean = torch.stack([draw.loss.detach() for draw in draws]).mean()
    torch.testing.assert_close(mean, full.loss.detach(), rtol=0.01, atol=0.0)
    torch.testing.assert_close(draws[0].alpha_K[0], full.alpha_K[0])  # every first draft token
    assert len({float(draw.loss.detach()) for draw in draws}) == 50


def test_carried_chains_count_for_those_that_were_not() -> None:
    batch = make_batch((40, 33))
    generator = torch.Generator().manual_seed(2)

    def share_of_deep_steps(share: float) -> float:
        chains = lay_out(batch, STEPS, share, generator)
        judged = []
        for step in chains.steps:
            ones = torch.ones(step.row_N.shape, dtype=torch.float64)
            loss = ones * float(step is not chains.steps[0])
            judged.append(RowFigures(loss, ones, ones, ones.bool()))
        return float(weigh(chains, judged, 1.0).loss)

    everyone = share_of_deep_steps(1.0)
    some = [share_of_deep_steps(0.3) for _ in range(50)]

    assert everyone == pytest.approx(0.6, abs=0.05)  # weights 4, 3, 2, 1; fewer at the end
    assert sum(some) / 50 == pytest.approx(everyone, abs=0.01)


def test_rows_without_loss_get_none() -> None:
    model, batch = make_model(), make_batch((12, 9))
    quiet = replace(batch, loss_BS=torch.zeros_like(batch.loss_BS))

    result = ttt_loss(model, EMBED, head(quiet), quiet, Objective())

    assert float(result.loss.detach()) == 0
    assert result.num_rows == 0


def brute_alphas(model: Eagle3, batch: TTTBatch, temperature: float) -> Tensor:
    """Acceptance of every full chain of sequence 0, anchor by anchor."""
    rows = []
    for anchor in range(1, 12 - STEPS):
        logits = reference_chain_logits(
            model,
            EMBED,
            batch.token_ids_BS[0],
            batch.features_BSF[0],
            batch.known_BS[0],
            anchor,
            STEPS,
        )
        places = torch.arange(anchor, anchor + STEPS)
        if temperature == 0:
            drafted = model.to_target_ids(logits.argmax(-1))
            rows.append((drafted == batch.token_ids_BS[0, places + 1]).float())
            continue
        p = (head(batch).logits(batch.last_hidden_BSH[0, places]) / temperature).softmax(-1)
        q = torch.zeros_like(p)
        ids = model.to_target_ids(torch.arange(logits.shape[-1]))
        q[:, ids] = (logits / temperature).softmax(-1)
        rows.append(torch.minimum(p, q).sum(-1).float())
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_chain_acceptance_is_that_of_drafting_one_by_one(temperature, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab), make_batch((12, 9))
    temperatures = torch.tensor([temperature, 1.0], dtype=torch.float64)

    alphas, sequence = chain_acceptance(model, EMBED, head(batch), batch, temperatures, STEPS)

    expected = brute_alphas(model, batch, temperature)
    torch.testing.assert_close(alphas[sequence == 0], expected)
    assert int((sequence == 1).sum()) == 8 - STEPS  # anchors 1.. with 4 rows before the last token


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_bfloat16_batch_trains_float32_weights() -> None:
    """What a GPU runs, on a CPU: the layer under autocast, master weights untouched."""
    model, batch = make_model(dtype=torch.float32), make_batch((12, 9), torch.float32)
    low = batch.to(torch.device("cpu"), torch.bfloat16)
    embed, objective = EMBED.bfloat16(), Objective(num_steps=3)

    wide = ttt_loss(model, EMBED.float(), head(batch), batch, objective)
    narrow = ttt_loss(model, embed, head(low), low, objective)
    narrow.loss.backward()

    torch.testing.assert_close(narrow.loss, wide.loss, rtol=0.05, atol=0.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
