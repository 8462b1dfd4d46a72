"""Distillation of a small head from a large frozen one, without a rows-by-vocabulary tensor.

``row_loss`` over ``FrozenHead.logits`` is the definition. ``distill`` computes the same value and
gradients, but a block of rows at a time, and overwrites each block of logits with its gradient.
The computation on a block is written in torch here and as kernels in ``distill_triton``; the
matrix products are the library's.

Shapes: N student rows, each imitating one of R teacher rows (several may imitate the same one); H
hidden size of the student or the teacher; V the teacher's vocabulary, D the student's, D <= V.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LossKind = Literal["lk", "forward_kl", "total_variation", "reverse_kl"]

ETA = 3.0
"""How fast LK moves from KL to TV as acceptance grows."""
MIN_MASS = 1e-6
"""Lower bound of the teacher's mass within the student's vocabulary, a divisor."""
MIN_PROB = 1e-30
"""Lower bound of the teacher's probabilities whose logarithm reverse KL takes; a normal float32, so
that flushing denormals does not make it 0."""
MIN_WEIGHT = 1e-9
"""Lower bound of a sum of weights, a divisor."""
_BLOCK_BYTES = 1_100_000_000
"""Bytes of a block of logits, student's and teacher's together, on a GPU."""
_STUDENT_TILE = 1024
"""Blocks of student rows on a GPU are multiples of this: 1,024 rows by 4,096 are 128 tiles of 128
by 256, which fill the 132 multiprocessors of an H100 or H200 once."""
_TEACHER_ROWS = (512, 1024)
"""Minimum and maximum rows of the teacher's logits on a GPU. The student's get the rest: more of
them mean fewer passes over the gradient of the weight."""
_CPU_ROWS = 128
"""128 x 4,096 floats fit a CPU's cache."""


def forward_kl(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(target || drafter) in nats: ``sum_x p'(x) (log p'(x) - log q(x))``.

    p' is p renormalised over the drafter's vocabulary. Gradient in the logits: ``q - p'``.

    Args:
        target_probs: [..., D], no gradient.
        draft_logits: [..., D].

    Returns:
        [...], >= 0.
    """
    renormalised = target_probs / target_probs.sum(dim=-1, keepdim=True)
    log_ratio = renormalised.clamp_min(1e-38).log() - draft_logits.log_softmax(dim=-1)
    return (renormalised * log_ratio).sum(dim=-1)


def reverse_kl(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(drafter || target) in nats: ``sum_x q(x) (log q(x) - log p'(x))``.

    It is large where the drafter proposes what the target does not take. p' is p renormalised over
    the drafter's vocabulary; probabilities below ``MIN_PROB`` count as that. Gradient in the
    logits: ``q (log q - log p' - KL)``.

    Args:
        target_probs: [..., D], no gradient.
        draft_logits: [..., D].

    Returns:
        [...], >= 0 up to what ``MIN_PROB`` adds to the probabilities.
    """
    mass = target_probs.sum(dim=-1, keepdim=True)
    log_target = target_probs.clamp_min(MIN_PROB).log() - mass.log()
    log_draft = draft_logits.log_softmax(dim=-1)
    return (log_draft.exp() * (log_draft - log_target)).sum(dim=-1)


def overlap(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """Probability that a token sampled from the drafter survives: ``alpha = sum_x min(p, q)``.

    Not renormalised: with a reduced vocabulary, p's mass outside counts as lost.
    """
    return torch.minimum(target_probs, draft_logits.softmax(dim=-1)).sum(dim=-1)


def total_variation(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """TV distance ``1 - alpha``, in [0, 1].

    Gradient in the logits: ``q (E_q[m] - m)`` with m = 1 where q < p. It is weak where q is near 0
    and p is not, so this loss is not used alone.
    """
    return 1 - overlap(target_probs, draft_logits)


def lk_hybrid(target_probs: Tensor, draft_logits: Tensor, eta: float = ETA) -> Tensor:
    """``lambda KL + (1 - lambda) TV`` with ``lambda = exp(-eta * stop_gradient(alpha))``, per row.

    KL dominates where the drafter misses, the acceptance itself where it nearly agrees.

    Source:
        LK losses, arXiv:2602.23881 (eta = 3).
    """
    alpha = overlap(target_probs, draft_logits)
    share = torch.exp(-eta * alpha.detach())
    return share * forward_kl(target_probs, draft_logits) + (1 - share) * (1 - alpha)


def row_loss(kind: LossKind, target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """The loss called ``kind``, one value per row."""
    losses = {
        "lk": lk_hybrid,
        "forward_kl": forward_kl,
        "total_variation": total_variation,
        "reverse_kl": reverse_kl,
    }
    return losses[kind](target_probs, draft_logits)


@dataclass(frozen=True, slots=True)
class FrozenHead:
    """A teacher's lm_head."""

    weight_VH: Tensor
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``; ``None``: unchanged."""

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V], in the dtype of the product."""
        return _capped(hidden_NH @ self.weight_VH.T, self.softcap)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher's distribution at R rows over the student's vocabulary, not yet computed."""

    hidden_RH: Tensor
    """The teacher head's input."""
    head: FrozenHead
    ids_D: Tensor | None
    """int64, the teacher's id of each student token; ``None``: both have the same vocabulary.
    Probabilities are normalised over all of V, not over D."""
    temperature_R: Tensor | None = None
    """float32 > 0, divides the logits; ``None``: 1."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the N student rows are compared with."""

    label_ids_N: Tensor
    """int64, the student's id of the committed token; any id if it has none."""
    label_known_N: Tensor
    """bool, the committed token is in the student's vocabulary."""
    teacher_row_N: Tensor | None = None
    """int64 index into R; ``None``: student row n imitates teacher row n."""

    def part(self, index: Any, first: int = 0) -> Rows:
        """A subset of the rows, by slice or index; teacher rows are counted from ``first``."""
        at = None if self.teacher_row_N is None else self.teacher_row_N[index] - first
        return Rows(self.label_ids_N[index], self.label_known_N[index], at)


class TeacherOrder(NamedTuple):
    """Student rows in the order of their teacher rows, known to the host."""

    order_N: Tensor
    """int64 index into N, on the device of the rows."""
    row_N: npt.NDArray[np.int64]
    """``teacher_row_N[order_N]``, ascending within each block."""
    blocks: tuple[slice, ...] | None = None
    """Which parts of ``order_N`` are computed together; ``None``: as many rows as fit."""


Weigh = Callable[[Tensor, int], Tensor]
"""Weights of the rows of a block, from the student's probabilities of their committed tokens and
the number of the block in ``TeacherOrder.blocks``; both in the order of ``order_N``."""


def teacher_order(teacher_row_N: Tensor, device: torch.device) -> TeacherOrder:
    """The order of student rows whose teacher rows are known before any of them is computed.

    Args:
        teacher_row_N: on any device; reading it waits for that device.
        device: of the rows.
    """
    row_N, order_N = teacher_row_N.sort(stable=True)
    return TeacherOrder(order_N.to(device), row_N.cpu().numpy())


class RowFigures(NamedTuple):
    """Results of each row; float32, or float64 if the logits are."""

    loss_N: Tensor
    """Unweighted loss."""
    alpha_N: Tensor
    """``sum_x min(p, q)``."""
    label_prob_N: Tensor
    """The student's probability of the committed token; 0 outside its vocabulary."""
    agrees_N: Tensor
    """bool, the student ranks no token above the committed one."""


class Target(NamedTuple):
    """The teacher's distribution at R rows over the student's vocabulary."""

    probs_RD: Tensor
    """float32, or float64 if the logits are; not renormalised."""
    mass_R: Tensor
    """Sum of each row of ``probs_RD``, at least ``MIN_MASS``."""
    negative_entropy_R: Tensor
    """``sum p' log p'`` of the renormalised rows, nats."""


def target_of(
    logits_RV: Tensor, ids_D: Tensor | None, softcap: float | None, temperature_R: Tensor | None
) -> Target:
    """The distribution that the teacher's raw logits give; see ``Teacher`` for the arguments."""
    scores = _capped(_wide(logits_RV), softcap)
    scores = scores if temperature_R is None else scores / temperature_R[:, None].to(scores.dtype)
    log_norm = scores.logsumexp(dim=-1)
    scores = scores if ids_D is None else scores[:, ids_D]
    probs = torch.exp(scores - log_norm[:, None])
    mass = probs.sum(dim=-1).clamp_min(MIN_MASS)
    negative_entropy = (probs * scores).sum(dim=-1) / mass - log_norm - mass.log()
    return Target(probs, mass, negative_entropy)


def judge_(
    scores_ND: Tensor,
    target: Target,
    rows: Rows,
    weights_N: Tensor | None,
    kind: LossKind,
) -> RowFigures:
    """Results of a block of rows; overwrites the student's logits ``scores_ND`` with their
    gradient.

    The gradient is that of ``(weights_N * loss_N).sum()``, in the dtype of ``scores_ND``:

        w (q (lambda + (1 - lambda) (E_q[m] - m)) - lambda p'),   m = 1 where q < p

    with lambda = 1 for KL, 0 for TV; that of reverse KL is in ``reverse_kl``. Few passes over
    [N, D]: on a CPU they take as long as the matrix products.

    Args:
        weights_N: in the dtype of the results; ``None``: no gradient, ``scores_ND`` is unchanged.
    """
    target = target if rows.teacher_row_N is None else _rows_of(target, rows.teacher_row_N)
    scores = _wide(scores_ND)
    probs = scores.softmax(dim=-1)
    top = scores.amax(dim=-1)
    log_norm = top - probs.amax(dim=-1).log()
    label = rows.label_ids_N[:, None]
    label_prob = probs.gather(1, label)[:, 0] * rows.label_known_N
    agrees = (scores.gather(1, label)[:, 0] >= top) & rows.label_known_N
    alpha = torch.minimum(target.probs_RD, probs).sum(dim=-1)
    if kind == "reverse_kl":
        ratio = scores - log_norm[:, None] - _log_probs(target)
        reverse = (probs * ratio).sum(dim=-1)
        if weights_N is not None:
            scores_ND.copy_(probs.mul_(ratio.sub_(reverse[:, None])).mul_(weights_N[:, None]))
        return RowFigures(reverse, alpha, label_prob, agrees)
    cross = log_norm - (target.probs_RD * scores).sum(dim=-1) / target.mass_R
    kl = target.negative_entropy_R + cross
    share = _share_of_kl(kind, alpha)
    figures = RowFigures(share * kl + (1 - share) * (1 - alpha), alpha, label_prob, agrees)
    if weights_N is None:
        return figures
    if kind == "forward_kl":
        probs.mul_(weights_N[:, None])
    else:
        below = torch.where(probs < target.probs_RD, probs, 0)
        pull = share + (1 - share) * below.sum(dim=-1)
        probs.mul_((weights_N * pull)[:, None])
        probs.addcmul_(below, (weights_N * (share - 1))[:, None])
    probs.addcmul_(target.probs_RD, (weights_N * share / target.mass_R)[:, None], value=-1)
    scores_ND.copy_(probs)
    return figures


class LabelFigures(NamedTuple):
    """The fields of ``RowFigures`` that need no teacher."""

    label_prob_N: Tensor
    agrees_N: Tensor


def judge_labels(scores_ND: Tensor, rows: Rows) -> LabelFigures:
    """The two results of ``judge_`` that need no teacher."""
    scores = _wide(scores_ND)
    at_label = scores.gather(1, rows.label_ids_N[:, None])[:, 0]
    prob = torch.exp(at_label - scores.logsumexp(dim=-1)) * rows.label_known_N
    return LabelFigures(prob, (at_label >= scores.amax(dim=-1)) & rows.label_known_N)


class Blocks(NamedTuple):
    """An implementation of the computation on a block of logits."""

    target_of: Callable[[Tensor, Tensor | None, float | None, Tensor | None], Any]
    """``target_of``; only the same implementation's ``judge_`` understands what it returns."""
    judge_: Callable[[Tensor, Any, Rows, Tensor | None, LossKind], RowFigures]
    judge_labels: Callable[[Tensor, Rows], LabelFigures]


BLOCKS = Blocks(target_of, judge_, judge_labels)
"""The definition."""


class Distilled(NamedTuple):
    """Result of ``distill``. Only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: ``(weights_N * figures.loss_N).sum()``."""
    figures: RowFigures


def distill(
    hidden_NH: Tensor,
    weight_DH: Tensor,
    teacher: Teacher,
    rows: Rows,
    weights_N: Tensor | Weigh,
    kind: LossKind,
    chunk_rows: int | None = None,
    blocks: Blocks = BLOCKS,
    order: TeacherOrder | None = None,
) -> Distilled:
    """Weighted loss of N student rows against their teacher rows, with its gradients.

    Uses at most 1.2 GB of GPU memory beyond inputs and gradients, for any N and for V and D up to
    151,936 in bfloat16. Rows are processed in the order of their teacher rows, so each teacher
    row's logits are computed once, however many student rows imitate it. Gradients are computed in
    the forward pass, while the logits exist; backward multiplies them in place by the gradient of
    ``loss``.

    Precision: logits and their gradients are rounded to the dtype of ``hidden_NH``; everything in
    between is float32. The gradient of ``weight_DH`` is summed over the blocks in the dtype of
    ``weight_DH``. If that is bfloat16, each block rounds the sum once, by at most 2^-8 of its
    size: a relative error of about ``0.0017 * sqrt(blocks)`` (root mean square), against 0.0017 for
    a single product over all rows; 8,192 rows are at most three blocks. A float32 weight with
    bfloat16 rows gets a float32 gradient, without this error.

    Args:
        hidden_NH: input of the student's head; float32, float64 or bfloat16.
        weight_DH: the student's head; of that dtype, or float32; the products then use a rounded
            copy that lives during the forward pass.
        teacher, rows: the host sorts and reads ``rows.teacher_row_N``, which synchronises.
        weights_N: weight of each row's loss; gets no gradient. Weights that depend on the student's
            own probabilities are computed by a function while the logits of their block exist, so
            that these are not computed twice; the loss is then the weighted mean.
        chunk_rows: maximum rows of logits at once, student's or teacher's; ``None``: what fits a
            CPU's cache, or 1.1 GB on a GPU.
        blocks: implementation; ``specops.device.distill`` picks it by device.
        order: of ``rows.teacher_row_N``. With it nothing waits for the device, and the call can be
            captured in a CUDA graph. ``None``: the host sorts and reads them.

    Raises:
        ValueError: shapes do not match.
        RuntimeError: a second backward pass; the first hands the gradients over.
    """
    _check(hidden_NH, weight_DH, teacher, rows, weights_N)
    with_grad = torch.is_grad_enabled()
    wants = (with_grad and hidden_NH.requires_grad, with_grad and weight_DH.requires_grad)
    if order is None and rows.teacher_row_N is not None:
        order = teacher_order(rows.teacher_row_N, hidden_NH.device)
    given = weights_N.detach() if isinstance(weights_N, Tensor) else weights_N
    job = _Job(teacher, rows, given, kind, chunk_rows, blocks, order, wants)
    loss, *columns = _Distill.apply(hidden_NH, weight_DH, job)  # type: ignore[no-untyped-call]
    return Distilled(loss, RowFigures(*columns))


@torch.no_grad()
def label_figures(
    hidden_NH: Tensor,
    weight_DH: Tensor,
    rows: Rows,
    chunk_rows: int | None = None,
    blocks: Blocks = BLOCKS,
) -> LabelFigures:
    """The label results of ``distill``, without a teacher, for row weights that depend on them.

    The arguments are those of ``distill``.
    """
    num_rows, width = hidden_NH.shape[0], weight_DH.shape[0]
    chunk, _ = _rows_at_once(hidden_NH, width, 0, chunk_rows)
    weight = weight_DH.to(hidden_NH.dtype)
    room = hidden_NH.new_empty((min(chunk, num_rows), width))
    parts = []
    for start in range(0, max(num_rows, 1), chunk):
        part = slice(start, start + chunk)
        hidden = hidden_NH[part]
        scores = torch.mm(hidden, weight.T, out=room[: hidden.shape[0]])
        parts.append(blocks.judge_labels(scores, rows.part(part)))
    return LabelFigures(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of ``distill`` that get no gradient."""

    teacher: Teacher
    rows: Rows
    weights_N: Tensor | Weigh
    kind: LossKind
    chunk_rows: int | None
    blocks: Blocks
    order: TeacherOrder | None
    """``None``: student row n imitates teacher row n."""
    wants: tuple[bool, bool]
    """Whether the hidden rows and the weight need a gradient."""


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor, ...]:
        figures, weights, ctx.grads = _walk(hidden, weight, job)
        ctx.mark_non_differentiable(*figures)
        loss = (weights * figures.loss_N).sum()
        if isinstance(job.weights_N, Tensor):
            ctx.share = None
            return (loss, *figures)
        ctx.share = 1 / weights.sum().clamp_min(MIN_WEIGHT)
        return (loss * ctx.share, *figures)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("distill's gradients were handed over by an earlier backward pass")
        grads, ctx.grads = ctx.grads, None  # nothing else holds them: they become .grad uncopied
        scale = grad_loss if ctx.share is None else grad_loss * ctx.share
        return (*(g if g is None else g.mul_(scale) for g in grads), None)


def _walk(
    hidden: Tensor, weight: Tensor, job: _Job
) -> tuple[RowFigures, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Results and weights of all rows and both gradients, block by block."""
    teacher, rows, head = job.teacher, job.rows, job.teacher.head
    blocks = job.blocks
    width, head_width = len(weight), len(head.weight_VH)
    most_own, most_seen = _rows_at_once(hidden, width, head_width, job.chunk_rows)
    layout = list(_layout(job.order, len(hidden), most_own, most_seen))
    most_own = max((own for own, _, _ in layout), default=0)
    low = weight.to(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden) if job.wants[0] else None
    grad_weight = torch.zeros_like(weight) if job.wants[1] else None
    room = hidden.new_empty((most_own, width))
    seen_room = teacher.hidden_RH.new_empty((min(most_seen, len(teacher.hidden_RH)), head_width))
    figures = _no_figures(hidden)
    weights_N = torch.zeros_like(figures.loss_N)
    for number, (num_own, member, parts) in enumerate(layout):
        own = hidden[member]
        scores = torch.mm(own, low.T, out=room[:num_own])
        compared = rows.part(member)
        if isinstance(job.weights_N, Tensor):
            weights = job.weights_N[member].to(figures.loss_N.dtype)
        else:
            weights = job.weights_N(blocks.judge_labels(scores, compared).label_prob_N, number)
        weights_N[member] = weights
        found = []
        for seen, place in parts:
            target = _target_block(teacher, seen, seen_room, blocks)
            wanted = weights[place] if any(job.wants) else None
            first = compared.part(place, seen.start)
            found.append(blocks.judge_(scores[place], target, first, wanted, job.kind))
        for column, values in zip(figures, zip(*found, strict=True), strict=True):
            column[member] = torch.cat(values)
        if grad_hidden is not None:
            grad_hidden[member] = scores @ low
        if grad_weight is not None:
            _add_product_(grad_weight, scores.T, own)
    return figures, weights_N, (grad_hidden, grad_weight)


def _target_block(teacher: Teacher, seen: slice, room: Tensor, blocks: Blocks) -> Any:
    """Input of ``judge_`` for the teacher rows ``seen``; their logits are written to ``room``."""
    hidden = teacher.hidden_RH[seen]
    logits = torch.mm(hidden, teacher.head.weight_VH.T, out=room[: hidden.shape[0]])
    heat = None if teacher.temperature_R is None else teacher.temperature_R[seen]
    return blocks.target_of(logits, teacher.ids_D, teacher.head.softcap, heat)


def _layout(
    order: TeacherOrder | None, num_rows: int, most_own: int, most_seen: int
) -> Iterator[tuple[int, Any, list[tuple[slice, slice]]]]:
    """Split the student rows into blocks of at most ``most_own``, or those of the order, in the
    order of their teacher rows.

    Yields:
        The number of a block's rows; these, as slice or index; and pairs of slices: at most
        ``most_seen`` teacher rows, and the part of the block that imitates them.
    """
    row_N = np.arange(num_rows) if order is None else order.row_N
    blocks = None if order is None else order.blocks
    if blocks is None:
        starts = range(0, num_rows, most_own)
        blocks = tuple(slice(start, min(start + most_own, num_rows)) for start in starts)
    for block in blocks:
        own = row_N[block]
        begin, end = int(own[0]), int(own[-1]) + 1
        edges = [*range(begin, end, most_seen), end]
        cuts = np.searchsorted(own, edges).tolist()
        seen = (slice(a, b) for a, b in itertools.pairwise(edges))
        places = (slice(a, b) for a, b in itertools.pairwise(cuts))
        parts = [(s, p) for s, p in zip(seen, places, strict=True) if p.start < p.stop]
        yield len(own), (block if order is None else order.order_N[block]), parts


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, without a temporary of its size if the library supports it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def chains_at_once(
    hidden_NH: Tensor, width: int, head_width: int, num_steps: int, chunk_rows: int | None
) -> int:
    """Chains whose ``num_steps`` rows each are computed together, if row k of chain r imitates
    teacher row r + k.

    Args:
        width, head_width: vocabulary sizes of the student and of the teacher.
        chunk_rows: see ``distill``.
    """
    own, seen = _rows_at_once(hidden_NH, width, head_width, chunk_rows)
    fitting = max(own // num_steps, 1)
    # The last chains imitate rows beyond their own: with those it is whole blocks of the teacher's.
    whole = (fitting + num_steps - 1) // seen * seen - num_steps + 1
    return whole if whole > 0 else fitting


def _rows_at_once(
    hidden: Tensor, width: int, head_width: int, chunk_rows: int | None
) -> tuple[int, int]:
    """Maximum rows of the student's logits and of the teacher's, for these vocabulary sizes."""
    if chunk_rows is not None:
        return chunk_rows, chunk_rows
    if hidden.device.type == "cpu":
        return _CPU_ROWS, _CPU_ROWS
    least, most = _TEACHER_ROWS
    own_bytes, seen_bytes = (n * hidden.element_size() for n in (width, max(head_width, 1)))
    fitting = (_BLOCK_BYTES - least * seen_bytes) // own_bytes // _STUDENT_TILE
    wanted = -(-hidden.shape[0] // _STUDENT_TILE)
    own = max(min(fitting, wanted), 1) * _STUDENT_TILE
    return own, most if own * own_bytes + most * seen_bytes <= _BLOCK_BYTES else least


def _no_figures(hidden: Tensor) -> RowFigures:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss, alpha, prob = hidden.new_zeros((3, len(hidden)), dtype=dtype)
    return RowFigures(loss, alpha, prob, hidden.new_zeros(len(hidden), dtype=torch.bool))


def _rows_of(target: Target, row_N: Tensor) -> Target:
    return Target(*(column[row_N] for column in target))


def _log_probs(target: Target) -> Tensor:
    """``log p'`` as ``reverse_kl`` has it."""
    return target.probs_RD.clamp_min(MIN_PROB).log_().sub_(target.mass_R.log()[:, None])


def _share_of_kl(kind: LossKind, alpha: Tensor) -> Tensor:
    """The weight of KL, called lambda in ``judge_``."""
    if kind == "lk":
        return torch.exp(-ETA * alpha)
    return torch.full_like(alpha, 1.0 if kind == "forward_kl" else 0.0)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _check(
    hidden: Tensor, weight: Tensor, teacher: Teacher, rows: Rows, weights_N: Tensor | Weigh
) -> None:
    """Check shapes only: checking values would synchronise a GPU."""
    num_rows = hidden.shape[0]
    shared = teacher.head.weight_VH.shape[0] if teacher.ids_D is None else teacher.ids_D.numel()
    if weight.shape != (shared, hidden.shape[1]):
        raise ValueError(
            f"the student's head must be [{shared}, {hidden.shape[1]}], got {tuple(weight.shape)}"
        )
    if rows.teacher_row_N is None and teacher.hidden_RH.shape[0] != num_rows:
        raise ValueError(
            f"{num_rows} student rows need as many teacher rows or teacher_row_N, "
            f"got {teacher.hidden_RH.shape[0]} teacher rows"
        )
    columns = {"label_ids_N": rows.label_ids_N, "label_known_N": rows.label_known_N}
    if isinstance(weights_N, Tensor):
        columns["weights_N"] = weights_N
    if rows.teacher_row_N is not None:
        columns["teacher_row_N"] = rows.teacher_row_N
    for name, column in columns.items():
        if column.shape != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}], got {tuple(column.shape)}")
