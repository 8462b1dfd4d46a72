"""The policy-gradient term equals its definition, token by token over a server's own chains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drafters.batch import TrainingBatch
from drafters.eagle3.reward import MOST_RATIO
from drafters.eagle3.training import ChainPlan, reference_chain_logits, ttt_loss
from policies.outcomes import Drafted, outcomes_of
from specops.distill import FrozenHead
from tests.drafters.eagle3.test_training import HIDDEN, STEPS, VOCAB, make_batch, make_model

SIZE = 24


def with_outcomes(batch: TrainingBatch, rounds: list[Drafted]) -> TrainingBatch:
    found = outcomes_of(len(batch.token_ids_T), rounds)
    bits = torch.from_numpy(found.q_logp_T).view(torch.int32)
    columns = torch.stack(
        (torch.from_numpy(found.depth_T), torch.from_numpy(found.rejected_T), bits), dim=1
    )
    return replace(batch, outcome_R3=columns[batch.row_R])


def rounds_of(ids: list[int], drawn: bool) -> list[Drafted]:
    """Rounds that kept 0 to 3 tokens, and one deeper than training-time test looks."""
    rounds, anchor = [], 3
    for kept, length in ((2, 3), (0, 2), (3, 3), (1, 4), (5, 6)):
        draft = [ids[anchor + 1 + at] for at in range(kept)]
        draft += [(ids[anchor + 1 + at] + 2) % VOCAB for at in range(kept, length)]
        q_logp = [-0.3 - 0.1 * at for at in range(length)] if drawn else None
        rounds.append(Drafted(anchor, draft, kept, q_logp))
        anchor += kept + 1
    return rounds


def by_the_book(model, embed, batch, rounds, heat: float) -> Tensor:  # type: ignore[no-untyped-def]
    """The term from the logits that a server would have drafted with."""
    terms: list[tuple[float, Tensor, float]] = []
    ids = batch.token_ids_T
    for one in rounds:
        logits = reference_chain_logits(
            model, embed, ids, batch.features_TF, batch.known_T, one.anchor, STEPS
        )
        logq = (logits / heat).log_softmax(-1)
        for depth in range(min(one.num_accepted + 1, len(one.draft_ids), STEPS)):
            token = one.draft_ids[depth]
            if model.d2t is not None:
                if token % 2 or token // 2 >= len(model.d2t):
                    continue  # it cannot be proposed any more
                token //= 2
            now = logq[depth, token]
            ratio = 1.0
            if one.q_logp is not None:
                ratio = min(MOST_RATIO, math.exp(float(now) - one.q_logp[depth]))
            terms.append((float(depth < one.num_accepted), now, ratio))
    baseline = sum(kept for kept, _, _ in terms) / len(terms)
    return -sum(w * (kept - baseline) * logq for kept, logq, w in terms) / len(terms)  # type: ignore[return-value]


def loss_of(model, batch, **plan) -> Tensor:  # type: ignore[no-untyped-def]
    embed, head = tables()
    generator = torch.Generator().manual_seed(5)
    return ttt_loss(model, embed, FrozenHead(head), batch, ChainPlan(STEPS, **plan), generator).loss


def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(VOCAB, HIDDEN, generator=generator).double() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize(
    ("drawn", "heat", "draft_vocab"), [(True, 0.7, VOCAB), (False, 0.0, VOCAB), (True, 1.0, 9)]
)
def test_the_term_is_the_one_of_the_tokens_that_were_drafted(
    keep_logits: bool, drawn: bool, heat: float, draft_vocab: int
) -> None:
    model, batch = make_model(draft_vocab), make_batch((SIZE,), temperatures=(heat,))
    rounds = rounds_of(batch.token_ids_T.tolist(), drawn)
    rewarded = with_outcomes(batch, rounds)
    plain = loss_of(model, rewarded, keep_logits=keep_logits)
    loss = loss_of(model, rewarded, keep_logits=keep_logits, reward_weight=0.5)

    wanted = by_the_book(model, tables()[0], batch, rounds, heat or 1.0)
    # The old probability of a token is kept in float32.
    torch.testing.assert_close(loss - plain, 0.5 * wanted, rtol=1e-5, atol=1e-7)


def test_a_share_of_the_chains_has_the_terms_of_those_chains() -> None:
    """First tokens of all rounds, and later ones of the chains that are carried."""
    model, batch = make_model(), make_batch((SIZE,))
    rounds = [replace(x, draft_ids=x.draft_ids[:1], num_accepted=min(x.num_accepted, 1))
              for x in rounds_of(batch.token_ids_T.tolist(), True)]  # fmt: skip
    rewarded = with_outcomes(batch, rounds)
    plain, loss = (
        loss_of(model, rewarded, chain_share=0.25, reward_weight=weight) for weight in (0.0, 1.0)
    )
    wanted = by_the_book(model, tables()[0], batch, rounds, 1.0)
    torch.testing.assert_close(loss - plain, wanted, rtol=1e-5, atol=1e-7)


def test_a_step_against_its_gradient_makes_kept_tokens_likelier_than_rejected_ones() -> None:
    model, batch = make_model(), make_batch((SIZE,))
    rounds = rounds_of(batch.token_ids_T.tolist(), drawn=False)
    rewarded = with_outcomes(batch, rounds)

    def term() -> Tensor:
        return loss_of(model, rewarded, reward_weight=1.0) - loss_of(model, rewarded)

    before = term()
    slopes = torch.autograd.grad(before, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            if slope is not None:
                parameter -= 1e-4 * slope
    assert term() < before


def test_without_outcomes_the_term_is_nothing() -> None:
    model, batch = make_model(), make_batch((SIZE,))
    rewarded = with_outcomes(batch, [])
    assert loss_of(model, rewarded, reward_weight=3.0).equal(loss_of(model, batch))
