"""Weights of a checkpoint that its model does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_HARMLESS = re.compile(
    r"(^|\.)("
    # Tables that are computed from the config, and masks of former implementations.
    r"inv_freq|original_inv_freq|rope\.freqs|position_ids|masked_bias|attn\.bias"
    r"|attention\.bias|attn\.rotary_emb\..*"
    # Scales of a quantized KV cache, which this server does not keep.
    r"|[kv]_scale|kv_scale|[kv]_zero_point"
    # Layers that predict further tokens: drafters, not the target.
    r"|mtp(_[a-z]+)?\..*|nextn\..*|medusa_head\..*"
    # Parts for another kind of input, and heads for training.
    r"|vision_[a-z]+\..*|visual\..*|image_[a-z]+\..*|audio_[a-z]+\..*|speech_[a-z]+\..*"
    r"|multi_modal_projector\..*|mm_projector\..*|embed_(vision|audio)\..*"
    r"|v_head\..*|value_head\..*|score\.weight"
    r")$"
)
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


def surplus_of(names: Iterable[str], config: Any) -> list[str]:
    """Of the tensors that a model does not have, those that something is missing without, sorted: a
    further layer, or a bias that the config denies, means that config and weights do not belong
    together.

    Args:
        names: of the tensors, less those that the model's own class passes over.
        config: of the model.
    """
    text = config.get_text_config()
    return sorted(name for name in names if not _is_harmless(name, text))


def _is_harmless(name: str, text: Any) -> bool:
    if name.endswith("lm_head.weight"):
        return bool(text.tie_word_embeddings)
    layer = _LAYER.search(name)
    predicting = getattr(text, "num_nextn_predict_layers", None) or 0
    if layer is not None and predicting:  # behind the others, as in DeepSeek's and GLM's
        last = text.num_hidden_layers + predicting
        if text.num_hidden_layers <= int(layer[2]) < last:
            return True
    return _HARMLESS.search(name) is not None
