"""What a trainer needs from a drafter that learns, whatever its kind.

This module imports no torch at run time: a command that only asks which kinds learn starts fast.

Shapes: B sequences, N chains, K draft positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from drafters.catalog import CATALOG

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from configs.schema import TrainerSettings
    from drafters.samples import Piece, Sample
    from targets.head import TargetHead


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
    num_rows: int
    """Rows with a loss."""


class Batch(Protocol):
    """Padded tensors built from pieces of samples; only the drafter that built them reads them."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move to ``device``; hidden rows are cast to ``dtype``."""
        ...


ModelT = TypeVar("ModelT", bound="nn.Module")
BatchT = TypeVar("BatchT", bound=Batch)


class Trainable(Protocol[ModelT, BatchT]):
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
    ) -> ModelT:
        """Model with random weights on the CPU, determined by the arguments alone.

        Args:
            target_config: Hugging Face config of the target.
            lm_head_VH: [V, H] float32 on the CPU, the target's.
            layer_ids: layers to tap; ``None``: the kind's default.

        Raises:
            ValueError: the target has no such layer.
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

    def collate(self, parts: Sequence[tuple[Sample, Piece]]) -> BatchT:
        """Pad pieces to the longest, in float32 on the CPU."""
        ...

    def loss(
        self,
        model: ModelT,
        head: TargetHead,
        batch: BatchT,
        settings: TrainerSettings,
        generator: torch.Generator | None,
    ) -> BatchLoss:
        """Training loss of a batch on the model's device.

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
        batch: BatchT,
        temperature_B: Tensor,
        num_draft: int,
    ) -> tuple[Tensor, Tensor]:
        """Acceptance of each position of every complete chain of ``num_draft`` tokens.

        Args:
            temperature_B: [B]; 0 is greedy.

        Returns:
            alphas_NK: [N, num_draft] float32, acceptance given that all earlier tokens were kept.
            owner_N: [N] int64, the sequence of each chain.
        """
        ...

    def tokens_per_step(self, alphas_NK: Tensor, num_draft: int) -> float | None:
        """Simulated tokens_per_step of chains of ``num_draft`` tokens; ``None`` without chains."""
        ...


def learning_kinds() -> tuple[str, ...]:
    """Kinds of drafters that learn."""
    return tuple(kind for kind, entry in CATALOG.items() if entry.trainable is not None)


def trainable(kind: str) -> Trainable[Any, Any]:
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
    found: Trainable[Any, Any] = pkgutil.resolve_name(entry.trainable)()
    return found
