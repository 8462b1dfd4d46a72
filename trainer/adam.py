"""AdamW for the small networks of draft policies, in loops of plain Python.

``torch.optim`` itself imports torch's compiler for its first optimizer: three seconds of a core,
which is more than such a fit needs, and a trainer begins a process for each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.optimizers import AdamW

_BETAS = (0.9, 0.999)


class Adam:
    """Kingma and Ba 2015, arXiv:1412.6980; with decay of the weights as in Loshchilov and Hutter
    2019, arXiv:1711.05101."""

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float = 0.0) -> None:
        """
        Args:
            parameters: float32, on a CPU.
        """
        self._owned = list(parameters)
        self._lr, self._never = torch.zeros(()), torch.zeros((), dtype=torch.bool)
        self._adamw = AdamW(self._owned, self._lr, weight_decay, _BETAS)

    def step(self, lr: float) -> None:
        """Move along the gradients, which every parameter has, and remove them."""
        self._lr.fill_(lr)
        self._adamw.step(self._never)
        for one in self._owned:
            one.grad = None
