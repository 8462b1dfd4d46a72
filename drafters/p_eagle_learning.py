"""Learning side of P-EAGLE: every depth of every chain from one pass, as a server drafts them.

Chains, their weights and their losses are those of ``drafters.eagle3.training``: the row at depth i
of the chain at anchor a is at position a + i and predicts x_{a+i+1}. It sees the rows of committed
tokens up to the anchor and the rows of its own chain before it; all rows but the anchor's read the
same learnt pair. No row reads the output of another, so all depths are computed at once.

Shapes: T positions, A chains carried beyond the first depth, K depths, H hidden.

Source: P-EAGLE, arXiv:2602.01469; speculators for what a row sees. They drop some more chains at
every depth (COD); ``ChainPlan.chain_share`` drops them at all depths but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from drafters.batch import TrainingBatch, follows_T
from drafters.eagle3.chain_attention import ChainAttention
from drafters.eagle3.from_target import imitate
from drafters.eagle3.model import config_for_target
from drafters.eagle3.trainable import LearnsByChains
from drafters.eagle3.training import Outputs
from drafters.p_eagle import PEagle, PEagleConfig
from drafters.stored_module import StoredModule
from drafters.trainable import TargetShape
from targets.causal import CausalWeights
from targets.last_layer import LastLayer

_MOST_LAYERS = 4
"""Of new drafters, as in the paper; a quarter of the target's if that is fewer."""


@dataclass(frozen=True, slots=True)
class PEagleTrainable(StoredModule[PEagle], LearnsByChains):
    """P-EAGLE's ``drafters.trainable.Trainable``, which describes every method."""

    config_class: ClassVar = PEagleConfig
    module_class: ClassVar = PEagle
    kind: str = "p_eagle"

    @property
    def outputs(self) -> Outputs:
        """See ``parallel_outputs``."""
        return parallel_outputs

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
        causal: CausalWeights | None = None,
    ) -> PEagle:
        """As a new EAGLE-3 drafter, with further layers that change nothing yet, and the last token
        of the vocabulary as mask."""
        assert causal is None, "only kinds that are a causal LM are given one"
        text = target_config.get_text_config()
        size = None if draft_ids is None else draft_ids.numel()
        first = config_for_target(target_config, layer_ids, size)
        num_layers = min(_MOST_LAYERS, max(1, text.num_hidden_layers // 4))
        model = PEagle(PEagleConfig(first, num_layers, text.vocab_size - 1))
        model.initialise(seed, lm_head_VH if draft_ids is None else lm_head_VH[draft_ids])
        if model.d2t is not None and draft_ids is not None:
            model.d2t.copy_(draft_ids - torch.arange(draft_ids.numel()))
        if last_layer is not None:
            imitate(model, last_layer)
        return model

    def target_shape(self, config: Mapping[str, Any]) -> TargetShape:
        """Vocabulary, hidden size and tapped layers of the target."""
        found = PEagleConfig.from_json(config).first
        return TargetShape(found.target_vocab_size, found.hidden_size, found.layer_ids)

    def config_to_json(self, model: PEagle) -> dict[str, Any]:
        """All fields of ``PEagleConfig``."""
        return model.parallel.to_json()

    def matrices(self, model: PEagle) -> list[Tensor]:
        """All products but the lm_head."""
        linears = (m for m in model.modules() if isinstance(m, nn.Linear))
        return [linear.weight for linear in linears if linear is not model.lm_head]


def parallel_outputs(
    model: PEagle, embed: Tensor, batch: TrainingBatch, anchor_A: Tensor, num_steps: int
) -> Iterator[Tensor]:
    """Yield outputs of depth 0 at every position [T, H], then of depths 1, 2, ... [A, H].

    The arguments, and what rows without features or past the end of a piece hold, are as in
    ``drafters.eagle3.training.ttt_outputs``.
    """
    mixed = partial(
        torch.autocast,
        batch.features_TF.device.type,
        dtype=torch.bfloat16,
        enabled=batch.features_TF.dtype == torch.bfloat16,
    )
    attends = [
        ChainAttention(batch.segment_T, follows_T(batch), anchor_A, batch.longest)
        for _ in range(model.parallel.num_layers)
    ]
    with mixed():
        hidden = model.fuse(batch.features_TF)
        hidden = torch.cat((torch.zeros_like(hidden[:1]), hidden[:-1]))
        embeds = embed[batch.token_ids_T].to(hidden.dtype)
        rope = model.rope(batch.positions_T)
        first = model.run(embeds, hidden, *rope, lambda layer, q, k, v: attends[layer](q, k, v))
    yield first
    if num_steps == 1:
        return
    depths = (num_steps - 1, len(anchor_A))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.reshape(*depths, *x.shape[1:]).unbind() for x in (q, k, v))
        return torch.cat([attends[layer](*each) for each in zip(*rows, strict=True)])

    ahead = torch.arange(1, num_steps, device=anchor_A.device)[:, None]
    positions = (batch.positions_T[anchor_A] + ahead).flatten()
    with mixed():
        mask_embed, mask_hidden = (x.expand(len(positions), -1) for x in model.masked())
        rope = model.rope(positions)
        outputs = model.run(mask_embed.to(mask_hidden.dtype), mask_hidden, *rope, attend)
    yield from outputs.view(*depths, outputs.shape[-1]).unbind()
