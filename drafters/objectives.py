"""What learning drafters minimise: every objective, one line each, and how rows are weighed by it.

``trainer.loss`` names an objective; every drafter that learns uses it through this module. It says
which loss the rows have, how much the positions of a draft weigh, and what is added at rows whose
draft token the target rejected. The losses of a row are defined in ``specops.distill``; a new
objective of known losses is one line in ``CATALOG``.

A row where a token of the drafter in training was rejected has a weight above 1
(``trainer.rejected_weight``). Its excess over 1 goes to the row's own loss, or to that which the
objective names for such rows.

Shapes: N rows or chains, K draft positions, H hidden, D vocabulary of the drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from configs.choices import SettingsError, known
from configs.schema import TrainerSettings
from specops.device import distill
from specops.distill import MIN_WEIGHT, Distilled, LossKind, Rows, Teacher, TeacherOrder

Positions = Literal["own", "dpace", "equal"]
"""How much the positions of a draft weigh. ``own``: as the drafter's authors have it, D-PACE unless
it says otherwise; ``dpace``: ``dpace_weights``; ``equal``: all the same."""
FLOOR = 0.5
"""Lower bound of the survival that D-PACE assumes at a position."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a drafter minimises."""

    loss: LossKind = "lk"
    """Of every row."""
    rejected: LossKind | None = None
    """Added at rows whose draft was rejected, with what their weight exceeds 1 by. ``None``: that
    goes to ``loss``."""
    positions: Positions = "own"


LK = Objective()
CATALOG: dict[str, Objective] = {
    "lk": LK,
    "lk_equal": Objective(positions="equal"),
    "lk_dpace": Objective(positions="dpace"),
    "lk_rejected_reverse_kl": Objective(rejected="reverse_kl"),
    "forward_kl": Objective("forward_kl"),
    "forward_kl_equal": Objective("forward_kl", positions="equal"),
    "forward_kl_rejected_reverse_kl": Objective("forward_kl", rejected="reverse_kl"),
    "reverse_kl": Objective("reverse_kl"),
    "total_variation": Objective("total_variation"),
}
"""Values of ``trainer.loss``."""


def objective_of(settings: TrainerSettings) -> Objective:
    """The objective that the settings name.

    Raises:
        SettingsError: the catalog does not hold it, or it asks for weights of rejected rows that
            the settings do not give.
    """
    known("trainer.loss", settings.loss, CATALOG)
    found = CATALOG[settings.loss]
    if found.rejected is not None and settings.rejected_weight == 1:
        raise SettingsError(
            f"trainer.loss {settings.loss!r} adds a loss at rejected rows with the weight "
            f"trainer.rejected_weight - 1, which is 0; set trainer.rejected_weight above 1"
        )
    return found


class RowShares(NamedTuple):
    """Weight of every row in the loss of a batch."""

    loss_N: Tensor
    """Of the objective's loss."""
    rejected_N: Tensor | None = None
    """Of what it adds at rejected rows; ``None``: nothing."""

    def each(self, change: Callable[[Tensor], Tensor]) -> RowShares:
        """Both, in another shape."""
        more_N = self.rejected_N
        return RowShares(change(self.loss_N), None if more_N is None else change(more_N))


def shares(objective: Objective, place_N: Tensor, row_N: Tensor) -> RowShares:
    """Weights of rows, normalised so that the loss is a mean.

    Args:
        place_N: weight of the row's position in its draft, any shape; 0 where there is no row.
        row_N: weight of the row that is predicted for, 1 or more where it was rejected; same shape.
    """
    if objective.rejected is None:
        weights_N = place_N * row_N
        return RowShares(weights_N / weights_N.sum().clamp_min(MIN_WEIGHT))
    mean_N = place_N / place_N.sum().clamp_min(MIN_WEIGHT)
    return RowShares(mean_N, mean_N * (row_N - 1))


def objective_loss(
    objective: Objective,
    hidden_NH: Tensor,
    weight_DH: Tensor,
    teacher: Teacher,
    rows: Rows,
    weights: RowShares,
    chunk_rows: int | None = None,
    order: TeacherOrder | None = None,
) -> Distilled:
    """The objective's loss of N rows, with its gradients, without keeping their logits.

    For the arguments see ``specops.distill.distill``. A loss that is added at rejected rows takes
    a second pass over all of them.

    Returns:
        The loss of both; figures are those of ``objective.loss``.
    """
    given = hidden_NH, weight_DH, teacher, rows
    found = distill(*given, weights.loss_N, objective.loss, chunk_rows, order)
    if weights.rejected_N is None:
        return found
    assert objective.rejected is not None, "shares has no weights for nothing"
    more = distill(*given, weights.rejected_N, objective.rejected, chunk_rows, order)
    return Distilled(found.loss + more.loss, found.figures)


def position_weights(
    positions: Positions, label_probs_KN: Tensor, valid_KN: Tensor, floor: float = FLOOR
) -> Tensor:
    """Weight of each position of a chain, [K, N], detached; 0 from its first invalid one on.

    For the arguments see ``dpace_weights``, which is what ``own`` means here.
    """
    if positions == "equal":
        return valid_KN.cumprod(dim=0).to(label_probs_KN.dtype)
    return dpace_weights(label_probs_KN, valid_KN, floor)


def dpace_weights(label_probs_KN: Tensor, valid_KN: Tensor, floor: float = FLOOR) -> Tensor:
    """Weight of each position of a chain: the gain in tokens_per_step from improving it.

    ``s_k = (1 - a) exp(-CE_k) + a``, ``w_k = sum_{j >= k} prod_{i <= j} s_i``. A chain ends at its
    first invalid position, whose weight and all later ones are 0.

    Args:
        label_probs_KN: [K, N] ``exp(-CE_k)``, the drafter's probability of the committed token.
        valid_KN: [K, N] bool, positions that have a loss.
        floor: a in the formula.

    Returns:
        [K, N], detached.

    Source:
        D-PACE, as implemented in speculators and SpecForge (a = 0.5).
    """
    survival_KN = ((1 - floor) * label_probs_KN.detach() + floor) * valid_KN
    reached_KN = survival_KN.cumprod(dim=0)
    return reached_KN.flip(0).cumsum(dim=0).flip(0)
