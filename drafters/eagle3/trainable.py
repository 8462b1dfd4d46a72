"""Learning side of EAGLE-3, as a trainer uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from configs.schema import TrainerSettings
from drafters.batch import TrainingBatch
from drafters.eagle3.from_target import imitate
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.training import (
    ChainModel,
    ChainPlan,
    Outputs,
    chain_acceptance,
    ttt_loss,
    ttt_outputs,
)
from drafters.objectives import objective_of
from drafters.stored_module import StoredModule
from drafters.trainable import BatchLoss, ChainAcceptance
from targets.head import TargetHead
from targets.last_layer import LastLayer

if TYPE_CHECKING:
    from targets.causal import CausalWeights

CPU_CHAIN_SHARE = 0.5
"""Share of the chains carried beyond the first draft token on a CPU, where training takes its time
from serving."""


class LearnsByChains:
    """The part of a ``drafters.trainable.Trainable`` that is the same for all drafters whose chains
    are those of ``drafters.eagle3.training``."""

    __slots__ = ()

    @property
    def outputs(self) -> Outputs:
        """How its rows are computed."""
        return ttt_outputs

    def loss(
        self,
        model: ChainModel,
        head: TargetHead,
        batch: TrainingBatch,
        settings: TrainerSettings,
        generator: torch.Generator | None,
    ) -> BatchLoss:
        """See ``ttt_loss``, as ``plan_for`` says."""
        plan = plan_for(settings, batch.token_ids_T.device)
        given = model, head.embed_VH, head.lm_head, batch, plan, generator
        return ttt_loss(*given, outputs=self.outputs)

    def acceptance(
        self,
        model: ChainModel,
        head: TargetHead,
        batch: TrainingBatch,
        num_draft: int,
        *,
        block: bool = False,
    ) -> ChainAcceptance:
        """See ``chain_acceptance``."""
        given = model, head.embed_VH, head.lm_head, batch, num_draft
        return chain_acceptance(*given, outputs=self.outputs, block=block)


@dataclass(frozen=True, slots=True)
class Eagle3Trainable(StoredModule[Eagle3], LearnsByChains):
    """EAGLE-3's ``drafters.trainable.Trainable``, which describes every method."""

    config_class: ClassVar = Eagle3Config
    module_class: ClassVar = Eagle3
    kind: str = "eagle3"
    takes_reward: bool = True
    """Its loss has the term of ``trainer.reward_weight``."""

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
        causal: CausalWeights | None = None,
    ) -> Eagle3:
        """The target's layer shape and its lm_head, as far as the draft vocabulary reaches."""
        assert causal is None, "only kinds that are a causal LM are given one"
        size = None if draft_ids is None else draft_ids.numel()
        model = Eagle3(config_for_target(target_config, layer_ids, size))
        head = lm_head_VH if draft_ids is None else lm_head_VH[draft_ids]
        model.initialise(seed, head)
        if model.d2t is not None and draft_ids is not None:
            model.d2t.copy_(draft_ids - torch.arange(draft_ids.numel()))
        if last_layer is not None:
            imitate(model, last_layer)
        return model

    def matrices(self, model: Eagle3) -> list[Tensor]:
        """All but the lm_head."""
        layers = (model.fc, model.qkv_proj, model.o_proj, model.gate_up_proj, model.down_proj)
        return [layer.weight for layer in layers]


def plan_for(settings: TrainerSettings, device: torch.device) -> ChainPlan:
    """On a GPU, carry every chain to its end and keep no logits; on a CPU, carry half of the
    chains and keep the logits. See ``ChainPlan`` for the costs."""
    on_gpu = device.type == "cuda"
    return ChainPlan(
        num_steps=settings.ttt_steps,
        objective=objective_of(settings),
        reward_weight=settings.reward_weight,
        chain_share=1.0 if on_gpu else CPU_CHAIN_SHARE,
        keep_logits=not on_gpu,
    )
