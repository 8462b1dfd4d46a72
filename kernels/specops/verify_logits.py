"""Verification of draft chains from logits: computes distributions and random numbers, and verifies
as in ``specops.verify``.

This is the definition, in float64. ``verify_logits_triton`` does the same without writing a
vocabulary-sized tensor and without synchronising with the host.

A row whose largest logit is NaN or infinite has no distribution. If it is the target's, its token
is ``UNSOUND``; if it is the drafter's, the draft ends before it. Either way a chain is judged as if
it had ended before the first such row: its length may depend on the tokens drafted before that, so
the rules stay exact. Rows after the last token that is kept are never looked at. Where the draft
token is certain (``DraftLaw.certain_RK``), the drafter's row is not looked at either.

Shapes: R requests, K draft tokens, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from specops.draft_sampling import (
    DraftLaw,
    draft_distribution,
    drafts_argmax,
    target_distribution,
)
from specops.rng import Numbering, Stream, device_exponentials, device_uniforms
from specops.sampling import SamplingRows, are_sound, distribution, race
from specops.verify import Verdict, count_leading, verify_block, verify_match, verify_standard

UNSOUND = -1
"""In place of a token: the target's row that decides it has no finite largest logit."""
_RACED_AT_ONCE = 1 << 18
"""Numbers of races that are made at a time: 2 MiB, which stay in a CPU's cache."""


class Rule(IntEnum):
    """Verification rule of a request; see ``specops.verify``. Greedy requests always use MATCH, to
    which the other rules reduce at temperature 0."""

    MATCH = 0
    STANDARD = 1
    BLOCK = 2


@dataclass(frozen=True, slots=True)
class LogitVerdict:
    """Outcome of verifying a draft, and log probabilities. Entries beyond a draft are 0."""

    num_accepted_R: Tensor
    """[R] int64 in 0..lens."""
    next_R: Tensor
    """[R] int64, the target's own token after the kept draft tokens, or ``UNSOUND``."""
    draft_logp_RK: Tensor
    """[R, K] float32, log probability of each draft token, after temperature and truncation;
    -inf where the target's row is unsound."""
    overlap_RK: Tensor
    """[R, K] float32, sum over v of min(p, q): probability that the position is accepted."""
    logprob_RK1: Tensor | None
    """[R, K + 1] float32, the target's log probability (temperature 1, no truncation) of each
    emitted token; ``None`` unless requested."""
    entropy_RK1: Tensor | None
    """[R, K + 1] float32, entropy in nats of that distribution after 0 .. lens draft tokens."""


def verify_logits(
    logits_RK1V: Tensor,
    sampling: SamplingRows,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    numbering: Numbering,
    drafted: DraftLaw | None = None,
    with_logprobs: bool = True,
) -> LogitVerdict:
    """Verify each request's draft by its rule and choose its next token.

    Args:
        logits_RK1V: [R, K + 1, V] float, the target's after each prefix of the draft.
        sampling: parameters of the R requests.
        draft_RK: [R, K] int64 target ids, in 0..V - 1 even beyond ``lens``.
        lens_R: [R] int64 in 0..K, the drafts' lengths.
        rules_R: [R] int64 of ``Rule``.
        numbering: ``positions_R`` is the position of the first draft token. Requests whose answer
            must not depend on round boundaries have nonce 0.
        drafted: the distribution the drafts were drawn from; ``None`` for delta drafts.
        with_logprobs: compute ``logprob_RK1`` and ``entropy_RK1``.

    Raises:
        ValueError: shapes do not match.
    """
    num_draft = draft_RK.shape[1]
    check_shapes(logits_RK1V, draft_RK, lens_R, rules_R, drafted)
    is_sound_RK1 = are_sound(logits_RK1V)
    place = torch.arange(num_draft + 1, device=draft_RK.device)
    judged_RK = is_sound_RK1[:, :num_draft]
    if drafted is not None:
        judged_RK = judged_RK & _have_laws(drafted)
    judged_R = count_leading(judged_RK, lens_R)
    p = distribution(_finite(logits_RK1V, is_sound_RK1).double(), sampling)
    by_match = (rules_R == Rule.MATCH) | (sampling.temperature_R == 0)
    all_match = bool(by_match.all())
    q = None
    if drafted is not None and not _are_one_hot(drafted, by_match):
        q_logits = _finite(drafted.logits_RKD, judged_RK).double()
        own_q = draft_distribution(q_logits, drafted.sampling, drafted.greedy_R)
        q = target_distribution(own_q, drafted.vocab, logits_RK1V.shape[-1])
        if drafted.certain_RK is not None:
            q.masked_fill_(drafted.certain_RK[..., None], 0.0)
            q.scatter_add_(-1, draft_RK[..., None], drafted.certain_RK[..., None].to(q.dtype))
    own = torch.where(is_sound_RK1, _own_tokens(p, sampling, rules_R, numbering), UNSOUND)
    if not num_draft and all_match and not with_logprobs:  # plain decoding: nothing to compare
        none_R0 = own.new_zeros((len(own), 0), dtype=torch.float32)
        return LogitVerdict(torch.zeros_like(lens_R), own[:, 0], none_R0, none_R0, None, None)
    accepted, following = verify_match(own, draft_RK, judged_R)
    if not all_match:
        judged = _judge(p, q, draft_RK, judged_R, rules_R, numbering)
        accepted = torch.where(by_match, accepted, judged.num_accepted_R)
        is_sound_R = is_sound_RK1.gather(1, accepted[:, None])[:, 0]
        chosen = torch.where(is_sound_R, judged.next_R, UNSOUND)
        following = torch.where(by_match, following, chosen)
    draft_p = p[:, :num_draft].gather(-1, draft_RK[..., None])[..., 0]
    if q is not None:
        overlap = torch.minimum(p[:, :num_draft], q).sum(-1)
    else:
        overlap = draft_p if drafted is None else _of_best(p[:, :num_draft], drafted, draft_RK)
    draft_logp = torch.where(is_sound_RK1[:, :num_draft], draft_p.log(), float("-inf"))
    logprob = entropy = None
    if with_logprobs:
        plain = logits_RK1V.double().log_softmax(dim=-1)
        emitted = torch.nn.functional.pad(draft_RK, (0, 1))
        emitted = torch.where(place == accepted[:, None], following[:, None].clamp(min=0), emitted)
        logprob = plain.gather(-1, emitted[..., None])[..., 0]
        logprob = torch.where(place <= accepted[:, None], logprob, 0.0).float()
        entropy = torch.special.entr(plain.exp()).sum(dim=-1)
        entropy = torch.where(place <= lens_R[:, None], entropy, 0.0).float()
    is_drafted = place[:num_draft] < lens_R[:, None]
    return LogitVerdict(
        accepted,
        following,
        torch.where(is_drafted, draft_logp, 0.0).float(),
        torch.where(place[:num_draft] < judged_R[:, None], overlap, 0.0).float(),
        logprob,
        entropy,
    )


def _have_laws(drafted: DraftLaw) -> Tensor:
    """[R, K] bool: the position has a q."""
    is_sound_RK = are_sound(drafted.logits_RKD)
    return is_sound_RK if drafted.certain_RK is None else is_sound_RK | drafted.certain_RK


def _are_one_hot(drafted: DraftLaw, by_match_R: Tensor) -> bool:
    """Every q is one-hot and need not be written out: the draft token is certain, or the drafter's
    argmax, which the MATCH rule compares with the target's own token."""
    is_best_R1 = (by_match_R & drafts_argmax(drafted.sampling, drafted.greedy_R))[:, None]
    is_known = is_best_R1 if drafted.certain_RK is None else is_best_R1 | drafted.certain_RK
    return bool(is_known.all())


def _of_best(p_RKV: Tensor, drafted: DraftLaw, draft_RK: Tensor) -> Tensor:
    """[R, K] p of the certain token or of the drafter's argmax: the overlap with a one-hot q."""
    best_RK = drafted.logits_RKD.argmax(dim=-1)
    if drafted.vocab is not None:
        best_RK = drafted.vocab.to_target(best_RK)
    if drafted.certain_RK is not None:
        best_RK = torch.where(drafted.certain_RK, draft_RK, best_RK)
    return p_RKV.gather(-1, best_RK[..., None])[..., 0]


def _finite(logits: Tensor, is_sound: Tensor) -> Tensor:
    """The logits, with zeros in unsound rows."""
    return logits if bool(is_sound.all()) else logits.where(is_sound[..., None], 0.0)


def _own_tokens(
    p_RK1V: Tensor, sampling: SamplingRows, rules_R: Tensor, numbering: Numbering
) -> Tensor:
    """[R, K + 1] the target's own token after each prefix of the draft: for a seeded request the
    winner of a race of the position's numbers, else the most probable one."""
    is_drawn = (rules_R == Rule.MATCH) & (sampling.temperature_R != 0)
    drawn = is_drawn.nonzero()[:, 0]
    num_rows = p_RK1V.shape[1]
    if len(drawn) < len(rules_R):
        own = p_RK1V.argmax(dim=-1)
    else:
        own = rules_R.new_empty(len(rules_R), num_rows)
    positions = _positions(numbering, num_rows)
    at_once = max(1, _RACED_AT_ONCE // p_RK1V[0].numel())
    for part in torch.split(drawn, at_once):
        exponentials = device_exponentials(
            numbering.keys_R[part], positions[part], numbering.nonces_R[part], Stream.TARGET,
            p_RK1V.shape[-1],
        )  # fmt: skip
        own[part] = race(p_RK1V[part], exponentials)
    return own


def _judge(
    p: Tensor,
    q: Tensor | None,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    numbering: Numbering,
) -> Verdict:
    """Verdicts by BLOCK, or by STANDARD for the other requests."""
    accept_u = _numbers(numbering, draft_RK.shape[1], Stream.ACCEPT)
    next_u = _numbers(numbering, 1, Stream.RESIDUAL)[:, 0]
    block = verify_block(p, q, draft_RK, lens_R, accept_u, next_u)
    standard = verify_standard(p, q, draft_RK, lens_R, accept_u, next_u)
    by_block = rules_R == Rule.BLOCK
    return replace(
        block,
        num_accepted_R=torch.where(by_block, block.num_accepted_R, standard.num_accepted_R),
        next_R=torch.where(by_block, block.next_R, standard.next_R),
    )


def check_shapes(
    logits_RK1V: Tensor,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    drafted: DraftLaw | None,
) -> None:
    """Raise ValueError if shapes do not match. Values are not checked: that would synchronise."""
    num_requests, num_draft = draft_RK.shape
    vocab_size = logits_RK1V.shape[-1]
    if logits_RK1V.shape[:2] != (num_requests, num_draft + 1):
        raise ValueError(
            f"logits must be [{num_requests}, {num_draft + 1}, V] for drafts "
            f"{tuple(draft_RK.shape)}, got {tuple(logits_RK1V.shape)}"
        )
    for name, rows in (("lens", lens_R), ("rules", rules_R)):
        if rows.shape != (num_requests,):
            raise ValueError(f"{name} must be [{num_requests}], got {tuple(rows.shape)}")
    if drafted is None:
        return
    shape = tuple(drafted.logits_RKD.shape)
    if shape[:2] != (num_requests, num_draft):
        raise ValueError(f"draft logits must be [{num_requests}, {num_draft}, D], got {shape}")
    if drafted.vocab is None and shape[2] != vocab_size:
        raise ValueError(
            f"a draft vocabulary of {shape[2]} needs a map to the target's of {vocab_size}"
        )
    if drafted.certain_RK is not None and drafted.certain_RK.shape != shape[:2]:
        raise ValueError(
            f"certain must be [{num_requests}, {num_draft}], got {tuple(drafted.certain_RK.shape)}"
        )


def _numbers(numbering: Numbering, count: int, stream: Stream) -> Tensor:
    """[R, count] float64 random numbers of the tokens from ``positions_R`` on."""
    positions_RK = _positions(numbering, count)
    return device_uniforms(numbering.keys_R, positions_RK, numbering.nonces_R, stream)


def _positions(numbering: Numbering, count: int) -> Tensor:
    """[R, count] positions of the tokens from ``positions_R`` on."""
    ahead = torch.arange(count, device=numbering.positions_R.device)
    return numbering.positions_R[:, None] + ahead
