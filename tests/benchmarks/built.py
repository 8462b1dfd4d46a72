"""A small engine as ``harness.engines.build`` hands it to a benchmark."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness.engines import Built
from benchmarks.harness.policy import PolicySwitch
from oracles.engines import make_engine, random_model
from serving.served_model import ServedModel
from serving.service import Service


def built_over(policy: Any, **options: Any) -> Built:
    """An engine over a random target whose policy can be switched; ``options`` of make_engine."""
    switch = PolicySwitch(policy)
    engine = make_engine(random_model("qwen3"), policy=switch, prefix_cache=False, **options)
    limits = engine.inbox.limits
    model = ServedModel("tiny", None, limits.vocab_size, limits.max_model_len, 8, 0)
    return Built(Service(model, engine, None, None, {}), switch, torch.device("cpu"))
