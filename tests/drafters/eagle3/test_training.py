"""What is trained is what is served: each step has the logits a server would draft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from drafters import norms
from drafters.batch import TrainingBatch, from_sequences, joined
from drafters.eagle3 import chain_attention
from drafters.eagle3 import model as eagle3_model
from drafters.eagle3.chains import lay_out
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.eagle3.training import (
    ChainPlan,
    chain_acceptance,
    reference_chain_logits,
    ttt_loss,
    ttt_outputs,
    weigh,
)
from drafters.objectives import Objective
from specops import chain_attention_triton, device, distill_triton, trained_rows_triton
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


def make_batch(
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    unknown: tuple[int, ...] = (),
    shift: int = 0,
    temperatures: tuple[float, ...] = (),
) -> TrainingBatch:
    """Pieces of these lengths behind each other. Positions ``unknown`` of each have no features."""
    generator = torch.Generator().manual_seed(11)
    parts: list[TrainingBatch] = []
    start = 0
    for number, size in enumerate(sizes):
        known = torch.arange(size)[None] + 1 < size
        known[:, [p for p in unknown if p < size]] = False
        features = torch.randn(1, size, 3 * HIDDEN, generator=generator).to(dtype)
        features[:, [p for p in unknown if p < size]] = 1e3  # must not matter
        one = from_sequences(
            torch.randint(0, VOCAB, (1, size), generator=generator),
            torch.arange(size)[None] + shift,
            features,
            torch.randn(1, size, HIDDEN, generator=generator).to(dtype),
            known,
            known,
            torch.tensor(temperatures[number : number + 1] or (1.0,)),
        )
        parts.append(replace(one, segment_T=one.segment_T + number, row_R=one.row_R + start))
        start += size
    return joined(parts)


EMBED = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5)).double()
HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(6)).double()


def head(batch: TrainingBatch) -> FrozenHead:
    return FrozenHead(HEAD.to(batch.features_TF))


def every_place(batch: TrainingBatch) -> Tensor:
    """Each position an anchor."""
    return torch.arange(batch.token_ids_T.numel())


def piece_of(batch: TrainingBatch, number: int) -> slice:
    """Where a piece is."""
    inside = (batch.segment_T == number).nonzero()[:, 0]
    return slice(int(inside[0]), int(inside[-1]) + 1)


def chain_of(
    model: Eagle3, embed: Tensor, batch: TrainingBatch, number: int, anchor: int
) -> Tensor:
    """What a server would draft after ``anchor`` in a piece."""
    own = piece_of(batch, number)
    return reference_chain_logits(
        model,
        embed,
        batch.token_ids_T[own],
        batch.features_TF[own],
        batch.known_T[own],
        anchor,
        STEPS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [3, 8, 32], ids=["blocks of 3", "of 8", "of 32"])
@pytest.mark.parametrize(
    "unknown", [(), (0, 1, 2, 3), (5, 6)], ids=["all known", "cached prefix", "gap"]
)
def test_every_step_has_the_logits_of_the_serving_chain(dtype, unknown, block, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setitem(chain_attention._BLOCK, "cpu", block)
    model, batch = make_model(dtype=dtype), make_batch((12, 9, 12), dtype, unknown)
    embed = EMBED.to(dtype)

    steps = [model.logits(g) for g in ttt_outputs(model, embed, batch, every_place(batch), STEPS)]

    compared = 0
    for number in range(3):
        own = piece_of(batch, number)
        for anchor in range(1, own.stop - own.start):
            known = batch.known_T[own]
            if not known[anchor - 1] or anchor + STEPS > len(known):
                continue
            chain = chain_of(model, embed, batch, number, anchor)
            trained = torch.stack([steps[i][own.start + anchor] for i in range(STEPS)])
            torch.testing.assert_close(trained, chain, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared >= 8


def test_pieces_do_not_see_each_other() -> None:
    model, both = make_model(), make_batch((12, 9))
    own = piece_of(both, 1)
    alone = replace(
        both,
        token_ids_T=both.token_ids_T[own],
        positions_T=both.positions_T[own],
        segment_T=both.segment_T[own],
        features_TF=both.features_TF[own],
        known_T=both.known_T[own],
    )

    packed = [g[own] for g in ttt_outputs(model, EMBED, both, every_place(both), STEPS)]
    single = list(ttt_outputs(model, EMBED, alone, every_place(alone), STEPS))

    for step, (left, right) in enumerate(zip(packed, single, strict=True)):
        inside = slice(1, 9 - step)  # chains that end within the piece
        torch.testing.assert_close(left[inside], right[inside])


def test_padding_changes_nothing() -> None:
    """A batch of fixed shape: positions behind the pieces, and rows behind those with a loss."""
    model, batch = make_model(), make_batch((12, 9))
    pad = 11
    longer = replace(
        batch,
        token_ids_T=functional.pad(batch.token_ids_T, (0, pad)),
        positions_T=functional.pad(batch.positions_T, (0, pad)),
        segment_T=functional.pad(batch.segment_T, (0, pad), value=-1),
        features_TF=functional.pad(batch.features_TF, (0, 0, 0, pad)),
        known_T=functional.pad(batch.known_T, (0, pad)),
        row_R=torch.cat((batch.row_R, torch.tensor([31, 30, 29, 0]))),
        is_row_R=functional.pad(batch.is_row_R, (0, 4)),
        last_hidden_RH=functional.pad(batch.last_hidden_RH, (0, 0, 0, 4)),
        temperature_R=functional.pad(batch.temperature_R, (0, 4)),
        by_match_R=functional.pad(batch.by_match_R, (0, 4)),
        weight_R=functional.pad(batch.weight_R, (0, 4)),
        longest=20,
    )
    found = []
    for given in (batch, longer):
        for keep in (True, False):
            model.zero_grad()
            plan = ChainPlan(num_steps=3, keep_logits=keep)
            result = ttt_loss(model, EMBED, head(given), given, plan)
            result.loss.backward()
            slopes = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([result.loss.detach(), result.alpha_K, result.agree_K, *slopes])

    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    short = chain_acceptance(model, EMBED, head(batch), batch, STEPS)
    long = chain_acceptance(model, EMBED, head(longer), longer, STEPS)
    for one, other in zip(short[:2], long[:2], strict=True):
        torch.testing.assert_close(other[long.is_full_R], one[short.is_full_R])


def test_a_row_weighs_as_much_as_it_is_said_to() -> None:
    model, batch = make_model(), make_batch((12, 9))
    plan = ChainPlan(num_steps=1, floor=1.0, keep_logits=True)
    plain = ttt_loss(model, EMBED, head(batch), batch, plan).loss
    single = []
    for row in range(len(batch.row_R)):
        weight = torch.zeros(len(batch.row_R))
        weight[row] = 1
        given = replace(batch, weight_R=weight)
        single.append(ttt_loss(model, EMBED, head(batch), given, plan).loss)

    heavy = replace(batch, weight_R=torch.ones(len(batch.row_R)).index_fill(0, torch.tensor(3), 5))
    found = ttt_loss(model, EMBED, head(batch), heavy, plan).loss
    again = ttt_loss(model, EMBED, head(batch), heavy, replace(plan, keep_logits=False)).loss

    want = (sum(single) + 4 * single[3]) / (len(single) + 4)
    torch.testing.assert_close(plain, sum(single) / len(single))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(again, want)


def test_absolute_position_of_a_piece_does_not_matter() -> None:
    model, batch, moved = make_model(), make_batch((12,)), make_batch((12,), shift=100)

    here = list(ttt_outputs(model, EMBED, batch, every_place(batch), STEPS))[-1]
    there = list(ttt_outputs(model, EMBED, moved, every_place(batch), STEPS))[-1]

    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)  # rope angles are float32


def test_a_chain_never_sees_features_at_or_after_its_anchor() -> None:
    model, batch = make_model(), make_batch((12,))
    features = batch.features_TF.clone().requires_grad_()
    seen = replace(batch, features_TF=features)

    for output in ttt_outputs(model, EMBED, seen, every_place(seen), STEPS):
        (slope,) = torch.autograd.grad(output[6].sum(), features, retain_graph=True)
        reached = slope.abs().sum(-1).nonzero()[:, 0].tolist()
        assert reached == list(range(6))  # h of the anchor is at position 5


@pytest.mark.parametrize("kind", ["lk", "forward_kl"])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_training_on_one_batch_raises_acceptance(kind, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab, torch.float32), make_batch((12, 9), torch.float32)
    embed, plan = EMBED.float(), ChainPlan(num_steps=3, objective=Objective(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    first = ttt_loss(model, embed, head(batch), batch, plan)

    for _ in range(60):
        optimizer.zero_grad()
        ttt_loss(model, embed, head(batch), batch, plan).loss.backward()
        optimizer.step()

    last = ttt_loss(model, embed, head(batch), batch, plan)
    assert last.loss < 0.5 * first.loss
    assert (last.alpha_K > first.alpha_K).all()


def test_gradient_of_the_whole_loss_matches_finite_differences() -> None:
    model, batch = make_model(), make_batch((9, 7), unknown=(2,))
    plan = ChainPlan(3, Objective("forward_kl"), floor=1.0, chunk_rows=4)
    fixed = torch.randn_like(model.fc.weight)
    fixed /= fixed.norm()

    def loss_at(shift: float) -> Tensor:
        with torch.no_grad():
            model.fc.weight.add_(fixed, alpha=shift)
        try:
            return ttt_loss(model, EMBED, head(batch), batch, plan).loss
        finally:
            with torch.no_grad():
                model.fc.weight.sub_(fixed, alpha=shift)

    loss = ttt_loss(model, EMBED, head(batch), batch, plan).loss
    loss.backward()
    assert model.fc.weight.grad is not None
    slope = (model.fc.weight.grad * fixed).sum()
    with torch.no_grad():
        numeric = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["lk", "forward_kl"])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_logits_that_are_not_kept_change_nothing(kind, draft_vocab):  # type: ignore[no-untyped-def]
    model, batch = make_model(draft_vocab), make_batch((12, 9), unknown=(5,))
    found = []

    for keep, chunk in ((True, 4), (False, 4), (False, None)):
        model.zero_grad()
        plan = ChainPlan(3, Objective(kind), chain_share=0.7, keep_logits=keep, chunk_rows=chunk)
        draw = torch.Generator().manual_seed(3)
        result = ttt_loss(model, EMBED, head(batch), batch, plan, draw)
        result.loss.backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([result.loss.detach(), result.alpha_K, result.agree_K, *slopes])

    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_share_of_the_chains_has_the_loss_of_all_on_average() -> None:
    model, batch = make_model(), make_batch((40, 33))
    full = ttt_loss(model, EMBED, head(batch), batch, ChainPlan(floor=1.0))
    generator = torch.Generator().manual_seed(1)
    plan = ChainPlan(chain_share=0.5, floor=1.0)

    draws = [ttt_loss(model, EMBED, head(batch), batch, plan, generator) for _ in range(50)]

    mean = torch.stack([draw.loss.detach() for draw in draws]).mean()
    torch.testing.assert_close(mean, full.loss.detach(), rtol=0.01, atol=0.0)
    torch.testing.assert_close(draws[0].alpha_K[0], full.alpha_K[0])  # every first draft token
    assert len({float(draw.loss.detach()) for draw in draws}) == 50


def test_carried_chains_count_for_those_that_were_not() -> None:
    batch = make_batch((40, 33))
    generator = torch.Generator().manual_seed(2)

    def share_of_deep_steps(share: float) -> float:
        chains = lay_out(batch, STEPS, share, generator)
        carried = chains.carried_A
        num_later = len(batch.row_R) if carried is None else len(carried)
        judged = []
        for step in range(STEPS):
            ones = torch.ones(num_later if step else len(batch.row_R), dtype=torch.float64)
            judged.append(RowFigures(ones * float(step > 0), ones, ones, ones.bool()))
        return float(weigh(chains, judged, 1.0).loss)

    everyone = share_of_deep_steps(1.0)
    some = [share_of_deep_steps(0.3) for _ in range(50)]

    assert everyone == pytest.approx(0.6, abs=0.05)  # weights 4, 3, 2, 1; fewer at the end
    assert sum(some) / 50 == pytest.approx(everyone, abs=0.01)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_without_rows_has_no_loss(share: float, keep: bool) -> None:
    model, batch = make_model(), make_batch((12, 9))
    none = slice(0, 0)
    quiet = replace(
        batch,
        row_R=batch.row_R[none],
        is_row_R=batch.is_row_R[none],
        last_hidden_RH=batch.last_hidden_RH[none],
        temperature_R=batch.temperature_R[none],
        by_match_R=batch.by_match_R[none],
        weight_R=batch.weight_R[none],
    )

    result = ttt_loss(
        model, EMBED, head(quiet), quiet, ChainPlan(chain_share=share, keep_logits=keep)
    )

    assert float(result.loss.detach()) == 0


def brute_alphas(model: Eagle3, batch: TrainingBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Overlap and acceptance given the text of every full chain of piece 0, anchor by anchor."""
    rows: list[tuple[Tensor, Tensor]] = []
    own = piece_of(batch, 0)
    ids, size = batch.token_ids_T[own], own.stop
    for anchor in range(1, size - STEPS):
        logits = chain_of(model, EMBED, batch, 0, anchor)
        places = torch.arange(anchor, anchor + STEPS)
        if temperature == 0:
            drafted = model.to_target_ids(logits.argmax(-1))
            rows.append(((drafted == ids[places + 1]).float(),) * 2)
            continue
        seen = batch.last_hidden_RH[places - 1]  # row 1 is the first with a loss
        p = (head(batch).logits(seen) / temperature).softmax(-1)
        q = torch.zeros_like(p)
        vocabulary = model.to_target_ids(torch.arange(logits.shape[-1]))
        q[:, vocabulary] = (logits / temperature).softmax(-1)
        at_label = ids[places + 1, None]
        ratio = q.gather(1, at_label)[:, 0] / p.gather(1, at_label)[:, 0]
        rows.append((torch.minimum(p, q).sum(-1).float(), ratio.clamp_max(1).float()))
    overlaps, kept = zip(*rows, strict=True)
    return torch.stack(overlaps), torch.stack(kept)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 11], ids=["whole vocabulary", "reduced"])
def test_chain_acceptance_is_that_of_drafting_one_by_one(temperature, draft_vocab):  # type: ignore[no-untyped-def]
    model = make_model(draft_vocab)
    batch = make_batch((12, 9), temperatures=(temperature, 1.0))

    found = chain_acceptance(model, EMBED, head(batch), batch, STEPS)

    number_R, is_full = batch.segment_T[batch.row_R], found.is_full_R
    expected = brute_alphas(model, batch, temperature)
    for alphas, wanted in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(alphas[is_full & (number_R == 0)], wanted)
    # anchors 1.. with 4 rows before the last token
    assert int((is_full & (number_R == 1)).sum()) == 8 - STEPS


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_bfloat16_batch_trains_float32_weights() -> None:
    """What a GPU runs, on a CPU: the layer under autocast, master weights untouched."""
    model, batch = make_model(dtype=torch.float32), make_batch((12, 9), torch.float32)
    low = batch.to(torch.device("cpu"), torch.bfloat16)
    embed, plan = EMBED.bfloat16(), ChainPlan(num_steps=3)

    wide = ttt_loss(model, EMBED.float(), head(batch), batch, plan)
    narrow = ttt_loss(model, embed, head(low), low, plan)
    narrow.loss.backward()

    torch.testing.assert_close(narrow.loss, wide.loss, rtol=0.05, atol=0.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("unknown", [(), (0, 1, 2, 5, 6)], ids=["all known", "gaps"])
def test_the_kernels_of_an_update_give_the_same_loss_and_gradients(
    unknown: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trainer on a GPU computes, in float32 instead of bfloat16. A GPU's attention then
    multiplies as TF32."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch((12, 9, 12), torch.float32, unknown).to(place, torch.float32)
    config = replace(make_model().config, head_dim=16)
    model = Eagle3(config)
    model.initialise(seed=3)
    model.to(place)
    embed, plan = EMBED.float().to(place), ChainPlan(STEPS, keep_logits=False)
    is_exact = place.type == "cpu"

    def computed() -> list[Tensor]:
        model.zero_grad()
        found = ttt_loss(model, embed, head(batch), batch, plan)
        found.loss.backward()  # type: ignore[no-untyped-call]
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(slopes) == len(list(model.parameters()))
        return [found.loss.detach(), found.alpha_K, *slopes]

    wanted = computed()
    monkeypatch.setattr(norms, "trained_norm", trained_rows_triton.rms_norm)
    monkeypatch.setattr(eagle3_model, "trained_gate", trained_rows_triton.silu_gate)
    monkeypatch.setattr(eagle3_model, "rotate", trained_rows_triton.rotate)
    monkeypatch.setattr(chain_attention, "attend_chains", chain_attention_triton.attend_chains)
    monkeypatch.setattr(chain_attention, "can_attend_chains", lambda *_: True)
    monkeypatch.setattr(device, "_distill_blocks", lambda _: distill_triton.BLOCKS)

    for one, other in zip(computed(), wanted, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-6} if is_exact else {"rtol": 2e-2, "atol": 1e-3}
        torch.testing.assert_close(one, other, **close)
    rtol = 1e-5 if is_exact else 1e-3
    torch.testing.assert_close(computed()[0], wanted[0], rtol=rtol, atol=0)


@pytest.mark.parametrize("chunk", [4, 9, 40, 1 << 20])
@pytest.mark.parametrize("positions", ["own", "equal"])
def test_weights_of_blocks_are_those_of_the_whole_batch(chunk: int, positions: Any) -> None:
    """Blocks without kept logits of one chain, of some, and of all of them."""
    batch = make_batch((12, 9, 12), torch.float32, (5,))
    heavy = replace(batch, weight_R=1 + torch.arange(len(batch.row_R)) % 3)
    model, plan = make_model(dtype=torch.float32), ChainPlan(STEPS, Objective(positions=positions))

    def computed(plan: ChainPlan) -> list[Tensor]:
        model.zero_grad()
        found = ttt_loss(model, EMBED.float(), head(batch), heavy, plan)
        found.loss.backward()  # type: ignore[no-untyped-call]
        return [found.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    whole = computed(plan)
    blocks = computed(replace(plan, keep_logits=False, chunk_rows=chunk))

    torch.testing.assert_close(blocks[0], whole[0], rtol=1e-5, atol=0)
    for one, other in zip(blocks[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
