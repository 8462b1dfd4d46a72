"""A table of K by batch size, as operators write it: TensorRT-LLM's ``draft_len_schedule`` and
vLLM's ``num_speculative_tokens_per_batch_size``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from configs.schema import PolicySettings
from policies.interface import Outcome, PolicyContext
from policies.lengths import LengthPolicy, spread


class TablePolicy(LengthPolicy):
    """Looks K up by the size of the batch. Learns nothing."""

    kind = "table"

    def __init__(
        self, context: PolicyContext, drafter: str, lengths: Sequence[tuple[int, int]]
    ) -> None:
        """
        Args:
            lengths: (largest batch, K) in any order; larger batches decode plainly.
        """
        super().__init__(context, drafter)
        self._lengths = sorted(lengths)

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter`` and ``policy.table``."""
        return cls(context, settings.drafter, settings.table.lengths)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """The K of the smallest entry that covers the batch."""
        k = next((k for largest, k in self._lengths if batch <= largest), 0)
        return spread(min(k, max_k), max_k, 0.0)

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Do nothing."""

    def forget(self, calibration: dict[str, Any]) -> None:
        """Do nothing."""
