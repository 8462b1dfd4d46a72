"""Bugs planted in the functions that programs call. ``device_law`` must reject each result, also
with the kernels. M1, M2, ... are the numbers used in ``tests/serving/engine/test_mutants.py``.

Shapes: R requests, K draft tokens, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from oracles.device_law import Faces
from specops import device as faces
from specops.draft_sampling import Drafted, DraftLaw, VocabMap
from specops.rng import Numbering
from specops.sampling import SamplingRows
from specops.verify_logits import LogitVerdict


@dataclass(frozen=True, slots=True)
class Asked:
    """Arguments of the verification function, in order."""

    logits_RK1V: Tensor
    sampling: SamplingRows
    draft_RK: Tensor
    lens_R: Tensor
    rules_R: Tensor
    numbering: Numbering
    law: DraftLaw | None

    def judge(self) -> LogitVerdict:
        return faces.verify_logits(*(getattr(self, field.name) for field in fields(self)))


def judged_by(bug: Callable[[Asked], LogitVerdict]) -> Faces:
    return Faces(verify_logits=lambda *arguments: bug(Asked(*arguments)))


def laid_as(like: Tensor, values: Tensor) -> Tensor:
    """Copy values into the strides of ``like``; other strides would recompile the kernels."""
    return like.new_empty_strided(like.shape, like.stride()).copy_(values)


# ---- numbers -------------------------------------------------------------------------------------


def reuse_numbers(right: Numbering) -> Numbering:
    """A position that is drafted again gets the same random number as before."""
    return replace(right, nonces_R=torch.zeros_like(right.nonces_R))


def share_numbers(right: Numbering) -> Numbering:
    """M17: pairs of requests share a random number."""
    return replace(right, keys_R=right.keys_R // 2)


# ---- drafts, and their assumed distribution ------------------------------------------------------


def draft_greedily(
    logits: Tensor,
    sampling: SamplingRows,
    numbering: Numbering,
    greedy: Tensor,
    vocab: VocabMap | None,
) -> Drafted:
    """M4: the argmax is drafted, although q claims that the token was sampled."""
    drawn = faces.sample_draft(logits, sampling, numbering, torch.ones_like(greedy), vocab)
    return replace(drawn, laws=None)


def with_law(change: Callable[[DraftLaw], DraftLaw]) -> Callable[[Asked], LogitVerdict]:
    """Verification that assumes another draft distribution."""

    def judge(asked: Asked) -> LogitVerdict:
        law = None if asked.law is None else replace(change(asked.law), laws=None)
        return replace(asked, law=law).judge()

    return judge


def untempered(sampling: SamplingRows) -> SamplingRows:
    return replace(sampling, temperature_R=torch.ones_like(sampling.temperature_R))


def forget_shape(law: DraftLaw) -> DraftLaw:
    """M5: q is the drafter's distribution at temperature 1, whatever the drafts were drawn from."""
    return replace(law, sampling=untempered(law.sampling))


def wrong_weights(law: DraftLaw) -> DraftLaw:
    """M19: q comes from different weights than the drafts."""
    return replace(law, logits_RKD=law.logits_RKD.roll(1, dims=-1).contiguous())


# ---- verification --------------------------------------------------------------------------------


def late_rows(asked: Asked) -> LogitVerdict:
    """M8, M15: each position, including the bonus token, is judged by its predecessor's logits."""
    late = asked.logits_RK1V.roll(1, dims=1)
    return replace(asked, logits_RK1V=laid_as(asked.logits_RK1V, late)).judge()


def untempered_bonus(asked: Asked) -> LogitVerdict:
    """M9: the token after the last draft is drawn from the target at temperature 1."""
    place = torch.arange(asked.logits_RK1V.shape[1], device=asked.lens_R.device)
    is_bonus = (place == asked.lens_R[:, None])[..., None]
    hot = asked.logits_RK1V * asked.sampling.temperature_R[:, None, None]
    changed = torch.where(is_bonus, hot, asked.logits_RK1V)
    return replace(asked, logits_RK1V=laid_as(asked.logits_RK1V, changed)).judge()


def untempered_target(asked: Asked) -> LogitVerdict:
    """M11: the target's temperature is 1, whatever was requested."""
    return replace(asked, sampling=untempered(asked.sampling)).judge()


def keep_all(asked: Asked) -> LogitVerdict:
    """M3: every draft token is kept."""
    return replace(asked.judge(), num_accepted_R=asked.lens_R)


def correct_from_target(asked: Asked) -> LogitVerdict:
    """M6: after a rejection the next token is drawn from p instead of the residual."""
    right = asked.judge()
    request = torch.arange(len(asked.lens_R), device=asked.lens_R.device)
    row = asked.logits_RK1V[request, right.num_accepted_R][:, None]
    alone = replace(
        asked,
        logits_RK1V=laid_as(asked.logits_RK1V[:, :1], row),
        draft_RK=asked.draft_RK[:, :0],
        lens_R=torch.zeros_like(asked.lens_R),
        law=None,
    )
    return replace(right, next_R=alone.judge().next_R)


BUGS = {
    "numbers drawn again": Faces(numbering=reuse_numbers),
    "requests share a number": Faces(numbering=share_numbers),
    "greedy drafts": Faces(sample_draft=draft_greedily),
    "q without the temperature": judged_by(with_law(forget_shape)),
    "q of other weights": judged_by(with_law(wrong_weights)),
    "logits of the place before": judged_by(late_rows),
    "bonus without the temperature": judged_by(untempered_bonus),
    "target without the temperature": judged_by(untempered_target),
    "every draft kept": judged_by(keep_all),
    "corrections from the whole target": judged_by(correct_from_target),
}
"""Planted by the test and by the benchmark; both must detect each of them."""
