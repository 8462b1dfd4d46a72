"""The interface of every drafter, so that code outside this room need not know which one it is.

There are three sorts. A *host drafter* (``HostDrafter``) proposes token ids from text alone, on the
host, before a round is launched. A *text drafter* (``TextDrafter``) does so on the device, and a
*neural drafter* (``NeuralDrafter``) computes rows there; both are part of a round's program of
fixed shape, which is launched before the last one is read. All are lossless: verification uses the
exact distribution that a token was drawn from, and whether a token is verified depends on its
prefix only.

Shapes: R requests, K draft tokens, L lanes, N positions of a lane, T rows, m tapped layers, H
hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specops.attention import DecodePass
from specops.draft_sampling import VocabMap
from specops.lanes import OpenedRound
from specops.matches import TextDrafts


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of a drafter. Other code checks these instead of its name."""

    on_device: bool
    """Drafts on the device, within a round's program: a neural drafter or a text drafter. Otherwise
    it proposes on the host."""
    learns: bool
    """Has weights that a trainer updates: they are published, swapped, watched and rolled back."""
    needs_match: bool
    """Proposes only where text has occurred before, and nothing elsewhere."""
    draws: bool
    """Its tokens are drawn from a distribution q. Otherwise each is a function of the prefix."""
    picks_itself: bool = False
    """In a mix it drafts for the requests whose match it is sure of. Only text drafters."""
    shares_text: bool = False
    """Its drafts may follow text of other requests."""
    prior_acceptance: tuple[float, ...] = (0.6,)
    """Prior probability that the first draft token is kept: one value, or one for each kind of
    match, the first of them for no match."""
    prior_draft_cost: float = 0.08
    """Prior seconds to draft one token, as a share of a plain decoding step."""
    match_kinds: tuple[str, ...] = ()
    """Names of the kinds of match, for readers; empty if there is one prior."""
    former_of: str | None = None
    """Kind of the drafter that learns whose version before the newest it has, and that it drafts
    with as long as there is one; ``None``: its weights are its own, or it has none."""

    @property
    def has_versions(self) -> bool:
        """Its rounds say something about published weights."""
        return self.learns or self.former_of is not None


class Drafter(Protocol):
    """Attributes of every drafter."""

    @property
    def kind(self) -> str:
        """Its name in ``drafters.catalog``."""

    @property
    def traits(self) -> Traits: ...

    @property
    def version(self) -> int:
        """Version of the weights in force; 0 for a drafter without weights."""


class HostDrafter(Drafter, Protocol):
    """A drafter that follows the text of running requests. All calls come from the engine's thread.

    It is asked for a whole batch at a time. Most steps of a server may use another drafter or none:
    then it is not even told of the tokens that they commit, before somebody asks. ``begin``,
    ``extend`` and ``finish`` should only store text, and leave work to ``observe`` and ``propose``.
    """

    def begin(self, key: str, tokens: Sequence[int], namespace: str = "") -> None:
        """Start following a request.

        Args:
            key: identifies the request among the running ones.
            tokens: its prompt.
            namespace: text of requests in other namespaces must not influence its drafts.
        """

    def extend(self, keys: Sequence[str], news: Sequence[Sequence[int]]) -> None:
        """Append committed tokens to some requests."""

    def observe(self, keys: Sequence[str]) -> Sequence[int]:
        """Kind of the match that a proposal would continue for each request, 0 without one; others
        are the drafter's own, numbered from 1 as in ``Traits.prior_acceptance``. The policy sees
        it, so it depends on committed tokens only."""

    def propose(self, keys: Sequence[str], most: Sequence[int]) -> list[list[int]]:
        """Token ids that may follow the committed tokens of each request.

        Args:
            most: largest number of tokens for each request, 0 or more.
        """

    def finish(self, key: str, keep: bool, num_tokens: int | None = None) -> None:
        """Stop following a request.

        Args:
            keep: its text may be used to draft for later requests.
            num_tokens: its length, if it ended before the last tokens that were appended.
        """


@runtime_checkable
class RanksMatches(Protocol):
    """A host drafter that may find several matches for a request, and continues the best."""

    @property
    def kind(self) -> str:
        """See ``Drafter``."""

    def rank(self, values: Sequence[float] | None) -> None:
        """Continue matches of the kind with the highest value from now on.

        Args:
            values: tokens that a draft is expected to bring, by kind of match; ``None``: by the
                drafter's own priors.
        """


class TextDrafter(Drafter, Protocol):
    """A drafter that proposes on the device, from text that lies there. Its drafts are certain, not
    drawn. All calls come from the engine's thread."""

    def begin(self, namespace: str) -> int:
        """A request begins.

        Args:
            namespace: text of requests in other namespaces must not influence its drafts.

        Returns:
            Number of the namespace, which rounds find in ``Field.SPACE``.
        """

    def finish(self, text_N: Tensor | None, namespace: str) -> None:
        """A request has ended; called once for each that has begun.

        Args:
            text_N: [N] int32 on the device, its text, if drafts for later requests may be taken
                from it. It is overwritten later.
        """

    def propose(self, texts_LN: Tensor, opened: OpenedRound, num_draft: int) -> TextDrafts:
        """Draft for the requests of a round. Can be captured in a CUDA graph.

        Args:
            texts_LN: [L, N] int32, see ``LaneState``.
        """


class NeuralDrafter(Drafter, Protocol):
    """A drafter that computes rows over pages that share the target's slot numbers.

    It never rolls back: rows of rejected drafts lie behind the committed ones and are overwritten.
    Everything here can be captured in a CUDA graph: launches depend on shapes only.
    """

    version: int

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers of the target whose hidden states it reads."""

    @property
    def output_size(self) -> int:
        """Width of the output kept for each request, from which its next draft starts."""

    @property
    def first_row(self) -> int:
        """Position of a request's first row: 1 if rows need hidden states of the position before
        them, 0 if they come from tokens alone."""

    @property
    def vocab(self) -> VocabMap | None:
        """A reduced draft vocabulary; ``None`` if it proposes from the target's."""

    @property
    def module(self) -> torch.nn.Module:
        """Its weights, which swaps overwrite in place."""

    def fuse(self, num_positions: int) -> str | None:
        """Use fused operations from now on, if they compute the same.

        Args:
            num_positions: exclusive upper bound on the rows' positions.

        Returns:
            Why they are not used; ``None`` if they are.
        """

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """Compute the rows of committed tokens; returns their outputs, [T, output_size].

        Args:
            ids_T: [T] int64 tokens of the rows.
            features_TmH: [T, m, H] tapped hidden states of the positions before them.
            at: the rows' requests and first positions.
        """

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Draft after anchors whose rows have been computed; returns [R, num_draft] int64 ids.

        Args:
            outputs_RH: [R, output_size] output of each anchor's row.
            at: one row for each request, at the position after its anchor.
            choose: (logits [R, Vd], number of the drafted token) -> target ids [R].
        """


@runtime_checkable
class ChoosesTogether(Protocol):
    """A ``choose`` of ``NeuralDrafter.propose`` that can choose the tokens of a block at once, in
    fewer launches."""

    def together(self, logits_KRV: Tensor) -> Tensor:
        """Target ids [R, K] int64 of K positions, from contiguous logits [K, R, Vd]."""


@runtime_checkable
class KeepsLogits(Protocol):
    """A ``choose`` of ``NeuralDrafter.propose`` that keeps the logits of all positions together:
    those that are written where it says need not be copied."""

    def place(self, number: int, like_RD: Tensor) -> Tensor:
        """[R, Vd] for the logits of a drafted token, whose rows need not be adjacent; to be passed
        to ``choose`` once they are written.

        Args:
            like_RD: of their shape, dtype and device; only these are read.
        """


def choose_block(choose: Callable[[Tensor, int], Tensor], logits_KRV: Tensor) -> Tensor:
    """Target ids [R, K] int64 of a draft whose positions do not depend on each other's tokens.

    Args:
        choose: see ``NeuralDrafter.propose``.
        logits_KRV: [K, R, Vd] contiguous.
    """
    if isinstance(choose, ChoosesTogether):
        return choose.together(logits_KRV)
    each = logits_KRV.unbind()
    return torch.stack([choose(logits_RV, k) for k, logits_RV in enumerate(each)], dim=1)


@runtime_checkable
class FollowsTarget(Protocol):
    """A neural drafter with copies of the target's weights, besides tensors that it shares."""

    def follow_target(self) -> None:
        """The target's weights were overwritten where they lie: make the copies again, in place.
        Called between two steps, on the engine's thread."""


@runtime_checkable
class FollowsWeights(Protocol):
    """A neural drafter that may compute with copies of its own weights."""

    def follow_weights(self) -> None:
        """Its module's weights were overwritten where they lie: make the copies again. Called
        between two steps, on the engine's thread."""


def weights_were_overwritten(drafter: NeuralDrafter) -> None:
    """Tell a drafter, if it has copies of its weights; else the next pass reads the new ones."""
    if isinstance(drafter, FollowsWeights):
        drafter.follow_weights()


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What a drafter is built from: its settings and facts about the engine."""

    settings: Any
    """``configs.schema.DrafterSettings``: its own section and shared keys."""
    embed: torch.nn.Module
    """The target's token embedding, with its own scaling if it has one."""
    lm_head: torch.nn.Module
    """The target's lm_head; its weight is [V, H]."""
    hidden_size: int
    """H of the target."""
    vocab_size: int
    """V of the target."""
    num_slots: int
    """Slots of the target's KV pool; a neural drafter's pool uses the same numbers."""
    logits: Callable[[Tensor], Tensor]
    """The target's: input of the lm_head [..., H] -> logits [..., V], capped if it caps them."""
    device: torch.device
    dtype: torch.dtype
    weights: Weights | None
    """First weights of a drafter that learns; ``None`` for the others."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One published version of a drafter that learns."""

    version: int
    config: dict[str, Any]
    """``Manifest.drafter_config``."""
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What the catalog knows about one kind of drafter."""

    traits: Traits
    build: Callable[[DrafterContext], HostDrafter | TextDrafter | NeuralDrafter]
    layer_ids: Callable[[Weights | None], tuple[int, ...]] = lambda _weights: ()
    """Layers of the target that it reads, given the weights it begins with."""
    on_device: DrafterKind | None = None
    """The same kind as a ``TextDrafter``, if it is a host drafter and can be one."""
