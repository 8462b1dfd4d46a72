"""Learning side of MTP heads.

They learn by the training-time test of EAGLE-3: row p of step i is what serving computes when it
drafts token i + 1 after the anchor p - i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from drafters.eagle3.trainable import LearnsByChains
from drafters.formats.checkpoint import read_checkpoint
from drafters.formats.mtp import carried, order_of
from drafters.mtp import Mtp, MtpConfig, config_for_target
from drafters.stored_module import StoredModule
from targets.last_layer import LastLayer


@dataclass(frozen=True, slots=True)
class MtpTrainable(StoredModule[Mtp], LearnsByChains):
    """MTP's ``drafters.trainable.Trainable``, which describes every method, and a
    ``CarriedByTarget``."""

    config_class: ClassVar = MtpConfig
    module_class: ClassVar = Mtp
    kind: str = "mtp"
    takes_reward: bool = True
    """See ``Eagle3Trainable``."""

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
    ) -> Mtp:
        """The target's layer shape, in the order of new heads."""
        size = None if draft_ids is None else draft_ids.numel()
        model = Mtp(config_for_target(target_config, layer_ids, size))
        model.initialise(seed)
        _set_vocabulary(model, draft_ids)
        if last_layer is not None:
            imitate(model, last_layer)
        return model

    def carried_model(self, folder: Path, draft_ids: Tensor | None) -> Mtp | None:
        """The head that the target's own checkpoint holds."""
        checkpoint = read_checkpoint(folder)
        if order_of(checkpoint) is None:
            return None
        found = carried(checkpoint)
        model = self.load_model(found.config, found.tensors)
        if draft_ids is None:
            return model
        config = replace(model.config, draft_vocab_size=draft_ids.numel())
        reduced = Mtp(config)
        reduced.load_state_dict({**model.state_dict(), "d2t": torch.zeros_like(draft_ids)})
        _set_vocabulary(reduced, draft_ids)
        return reduced

    def matrices(self, model: Mtp) -> list[Tensor]:
        """All products."""
        return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def _set_vocabulary(model: Mtp, draft_ids: Tensor | None) -> None:
    if model.d2t is not None and draft_ids is not None:
        model.d2t.copy_(draft_ids - torch.arange(draft_ids.numel()))


@torch.no_grad()
def imitate(model: Mtp, last: LastLayer) -> None:
    """Overwrite a new head's layer with the target's last one, and its norms with the final one.

    Queries and keys stay random if only one of the two normalises them per head.
    """
    c = model.config
    attention: Any = model.attention
    sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    q, k, v = torch.split(attention.qkv_proj.weight, sizes)
    if c.has_head_norms and last.normed_qk is not None:
        q.copy_(last.normed_qk.q)
        k.copy_(last.normed_qk.k)
        attention.q_norm.weight.copy_(last.normed_qk.q_norm_D)
        attention.k_norm.weight.copy_(last.normed_qk.k_norm_D)
    elif not c.has_head_norms and last.qk is not None:
        q.copy_(last.qk[0])
        k.copy_(last.qk[1])
    v.copy_(last.v)
    attention.o_proj.weight.copy_(last.o)
    model.gate_up_proj.weight.copy_(last.gate_up)
    model.down_proj.weight.copy_(last.down)
    model.input_layernorm.weight.copy_(last.attention_norm_H)
    model.post_attention_layernorm.weight.copy_(last.mlp_norm_H)
    model.norm.weight.copy_(last.final_norm_H)
    model.target_norm.weight.copy_(last.final_norm_H)
