"""What is trained is what is served: each step has the logits a server would draft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drafters.eagle3 import Eagle3, Eagle3Config
from drafters.eagle3_training import (
    Objective,
    TTTBatch,
    chain_acceptance,
    reference_chain_logits,
    ttt_loss,
    ttt_outputs,
)

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


def head(hidden: Tensor) -> Tensor:
    return hidden @ HEAD.to(hidden.dtype).T


def with_gaps(batch: TTTBatch, unknown: list[int]) -> TTTBatch:
    known = batch.known_BS.clone()
    known[:, unknown] = False
    features = batch.features_BSF.clone()
    features[:, unknown] = 1e3  # must not matter
    return replace(batch, features_BSF=features, known_BS=known, loss_BS=batch.loss_BS & known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "unknown", [[], [0, 1, 2, 3], [5, 6]], ids=["all known", "cached prefix", "gap"]
)
def test_every_step_has_the_logits_of_the_serving_chain(dtype, unknown):  # type: ignore[no-untyped-def]
    model, batch = make_model(dtype=dtype), with_gaps(make_batch((12, 9), dtype), unknown)
    embed = EMBED.to(dtype)

    steps = [model.logits(g) for g in ttt_outputs(model, embed, batch, STEPS)]

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
            trained = torch.stack([steps[i][b, anchor + i] for i in range(STEPS)])
            torch.testing.assert_close(trained, chain, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared >= 5


def test_padding_changes_nothing() -> None:
    model, both = make_model(), make_batch((12, 9))
    alone = TTTBatch(*(getattr(both, name)[1:, :9] for name in TTTBatch.__slots__))

    padded = [g[1, :9] for g in ttt_outputs(model, EMBED, both, STEPS)]
    unpadded = [g[0] for g in ttt_outputs(model, EMBED, alone, STEPS)]

    for step, (left, right) in enumerate(zip(padded, unpadded, strict=True)):
        torch.testing.assert_close(left[step + 1 :], right[step + 1 :])  # rows with an anchor


def test_absolute_position_of_a_piece_does_not_matter() -> None:
    model, batch = make_model(), make_batch((12,))
    moved = replace(batch, positions_BS=batch.positions_BS + 100)

    here = list(ttt_outputs(model, EMBED, batch, STEPS))[-1]
    there = list(ttt_outputs(model, EMBED, moved, STEPS))[-1]

    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)  # rope angles are float32


def test_a_row_never_sees_what_comes_after_its_token() -> None:
    model, batch = make_model(), make_batch((12,))
    features = batch.features_BSF.clone().requires_grad_()
    seen = replace(batch, features_BSF=features)

    for step, output in enumerate(ttt_outputs(model, EMBED, seen, STEPS)):
        (slope,) = torch.autograd.grad(output[0, 8].sum(), features, retain_graph=True)
        reached = slope[0].abs().sum(-1).nonzero()[:, 0].tolist()
        assert reached == list(range(0, 8 - step))  # features up to anchor - 1 = 8 - step - 1


@pytest.mark.parametrize("kind", ["lk", "forward_kl"])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_training_on_one_batch_raises_acceptance(kind, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab, torch.float32), make_batch((12, 9), torch.float32)
    embed, objective = EMBED.float(), Objective(num_steps=3, loss=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    first = ttt_loss(model, embed, head, batch, objective)

    for _ in range(60):
        optimizer.zero_grad()
        ttt_loss(model, embed, head, batch, objective).loss.backward()
        optimizer.step()

    last = ttt_loss(model, embed, head, batch, objective)
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
            return ttt_loss(model, EMBED, head, batch, objective).loss
        finally:
            with torch.no_grad():
                model.fc.weight.sub_(fixed, alpha=shift)

    loss = ttt_loss(model, EMBED, head, batch, objective).loss
    loss.backward()
    assert model.fc.weight.grad is not None
    slope = (model.fc.weight.grad * fixed).sum()
    with torch.no_grad():
        numeric = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)


def test_rows_without_loss_get_none() -> None:
    model, batch = make_model(), make_batch((12, 9))
    quiet = replace(batch, loss_BS=torch.zeros_like(batch.loss_BS))

    result = ttt_loss(model, EMBED, head, quiet, Objective())

    assert float(result.loss.detach()) == 0
    assert int(result.num_rows) == 0


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
        p = (head(batch.last_hidden_BSH[0, places]) / temperature).softmax(-1)
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

    alphas, sequence = chain_acceptance(model, EMBED, head, batch, temperatures, STEPS)

    expected = brute_alphas(model, batch, temperature)
    torch.testing.assert_close(alphas[sequence == 0], expected)
    assert int((sequence == 1).sum()) == 8 - STEPS  # anchors 1.. with 4 rows before the last token
