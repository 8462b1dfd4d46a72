"""What a trainer needs from a drafter that learns, whatever its kind.

This module imports no torch at run time: a command that only asks which kinds learn starts fast.

Shapes: R rows with a loss, N chains, K draft positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from drafters.catalog import CATALOG

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from configs.schema import TrainerSettings
    from drafters.batch import TrainingBatch
    from targets.causal import CausalWeights
    from targets.head import TargetHead
    from targets.last_layer import LastLayer


class TargetShape(NamedTuple):
    """What a drafter's config states about its target."""

    vocab_size: int
    hidden_size: int
    layer_ids: tuple[int, ...]
    """Tapped layers: residual stream after k decoder layers."""


class BatchLoss(NamedTuple):
    """Loss and statistics of one batch. Only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar to minimise."""
    alpha_K: Tensor
    """Mean overlap with the target at each draft position; 0 where no chain has the position."""
    agree_K: Tensor
    """Share of chains whose most likely draft token is the committed token."""


class ChainAcceptance(NamedTuple):
    """Acceptance of each position of the chain of K draft tokens that begins at each row, given
    that all earlier tokens were kept, at the temperature of the row; 0 where the chain has ended.
    ``drafters.kept`` says what each is good for."""

    overlap_RK: Tensor
    """float32 ``sum_x min(p, q)``; of greedy requests, 1 where the draft is what came."""
    kept_RK: Tensor
    """float32, given the text that came out, by the rule that verifies the request."""
    is_full_R: Tensor
    """bool, the chain has all K rows."""


ModelT = TypeVar("ModelT", bound="nn.Module")


class Trainable(Protocol[ModelT]):
    """Learning side of one kind of drafter. Stateless: the trainer owns the model.

    ``config`` is the drafter's config as JSON, as stored in a bundle's manifest.
    """

    @property
    def kind(self) -> str:
        """Kind that bundles carry in their manifest."""
        ...

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
        causal: CausalWeights | None = None,
    ) -> ModelT:
        """New model on the CPU, a function of its arguments alone.

        Args:
            target_config: Hugging Face config of the target.
            lm_head_VH: [V, H] float32 on the CPU, the target's.
            layer_ids: layers to tap; ``None``: the kind's default.
            draft_ids: [D] int64 ascending, the only tokens it can propose; ``None``: all.
            last_layer: the target's, to start from instead of random weights.
            causal: the causal LM to start from; given to kinds that are one (``Entry.is_model``).

        Raises:
            ValueError: the target has no such layer, or the kind does not take an argument.
        """
        ...

    def load_model(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelT:
        """Model on the CPU with a bundle's weights, copied and cast to float32.

        Raises:
            ValueError: see ``check``.
        """
        ...

    def check(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compare the names and shapes of a bundle's tensors with its config.

        Raises:
            ValueError: a key of the config or a tensor is missing, unknown or misshapen.
        """
        ...

    def target_shape(self, config: Mapping[str, Any]) -> TargetShape:
        """Shape of the target that ``config`` was made for.

        Raises:
            ValueError: not a config of this kind.
        """
        ...

    def config_to_json(self, model: ModelT) -> dict[str, Any]:
        """Config of ``model`` for a manifest."""
        ...

    def bundle_tensors(self, model: ModelT) -> dict[str, Tensor]:
        """Name -> tensor of everything that a bundle holds."""
        ...

    def matrices(self, model: ModelT) -> list[Tensor]:
        """Weights, [out, in], of products from hidden vectors to hidden vectors: what Muon may
        change. Tables of tokens are none."""
        ...

    def loss(
        self,
        model: ModelT,
        head: TargetHead,
        batch: TrainingBatch,
        settings: TrainerSettings,
        generator: torch.Generator | None,
    ) -> BatchLoss:
        """Training loss of a batch on the model's device.

        On a GPU nothing may wait for the device, and launches may depend on the shapes of the batch
        only: the trainer captures its updates in CUDA graphs.

        Args:
            head: embedding table and lm_head of the target, in the dtype of the batch.
            settings: which loss, and how many draft positions.
            generator: draws the chains to train, if only a share of them is trained.
        """
        ...

    def acceptance(
        self,
        model: ModelT,
        head: TargetHead,
        batch: TrainingBatch,
        num_draft: int,
        *,
        block: bool = False,
    ) -> ChainAcceptance:
        """Of the chain of ``num_draft`` tokens that begins at each row. Like ``loss`` it never
        waits for a GPU.

        Args:
            block: sampled requests without a seed are verified by the block rule, not the standard
                one.
        """
        ...


@runtime_checkable
class CarriedByTarget(Protocol):
    """A ``Trainable`` of drafters that a target's own checkpoint may hold."""

    def carried_model(self, folder: Path, draft_ids: Tensor | None) -> nn.Module | None:
        """The model that the target in ``folder`` carries, on the CPU in float32; ``None``: none.

        Args:
            draft_ids: see ``Trainable.new_model``.

        Raises:
            ValueError: it carries one that cannot run here.
        """
        ...


def learning_kinds() -> tuple[str, ...]:
    """Kinds of drafters that learn."""
    return tuple(kind for kind, entry in CATALOG.items() if entry.trainable is not None)


def trainable(kind: str) -> Trainable[Any]:
    """The learning side of a kind of drafter.

    Raises:
        ValueError: drafters of this kind do not learn.
    """
    entry = CATALOG.get(kind)
    if entry is None or entry.trainable is None:
        raise ValueError(
            f"a drafter of kind {kind!r} cannot be trained; kinds that learn: "
            f"{', '.join(learning_kinds())}"
        )
    found: Trainable[Any] = pkgutil.resolve_name(entry.trainable)()
    return found
