"""A draft model as a folder of its own architecture, which ``transformers`` loads like any other.

To read one there is no layout: ``drafter.model`` names the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from drafters.draft_model.paged import DraftModelConfig
from drafters.formats.checkpoint import dtype_name
from drafters.formats.published import TargetTable
from targets.causal import empty_causal

_PREFIX = "lm."
"""Of its tensors in a bundle."""


def to_published(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors of the causal LM. Embedding and lm_head are two tensors, also
    where the model began with one for both."""
    causal = DraftModelConfig.from_json(config).causal
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    architecture = type(empty_causal(causal)).__name__
    return {**causal, "architectures": [architecture], "dtype": dtype_name(tensors)}, own
