"""torch's Adam and AdamW for the small networks of draft policies, number for number.

``torch.optim`` itself imports torch's compiler for its first optimizer: three seconds of a core,
which is more than such a fit needs, and a trainer begins a process for each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BETA, _BETA_SQUARED = 0.9, 0.999
_EPSILON = 1e-8


class Adam:
    """Kingma and Ba 2015, arXiv:1412.6980; with decay of the weights as in Loshchilov and Hutter
    2019, arXiv:1711.05101."""

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float = 0.0) -> None:
        """
        Args:
            parameters: float32, on a CPU.
        """
        self._owned, self._weight_decay, self._num_steps = list(parameters), weight_decay, 0
        self._means = [torch.zeros_like(one) for one in self._owned]
        self._squares = [torch.zeros_like(one) for one in self._owned]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move along the gradients, which every parameter has, and remove them."""
        gradients = [one.grad for one in self._owned if one.grad is not None]
        assert len(gradients) == len(self._owned), "a parameter has no gradient"
        self._num_steps += 1
        if self._weight_decay:
            torch._foreach_mul_(self._owned, 1 - lr * self._weight_decay)
        torch._foreach_lerp_(self._means, gradients, 1 - _BETA)
        torch._foreach_mul_(self._squares, _BETA_SQUARED)
        torch._foreach_addcmul_(self._squares, gradients, gradients, value=1 - _BETA_SQUARED)
        sizes = torch._foreach_sqrt(self._squares)
        torch._foreach_div_(sizes, (1 - _BETA_SQUARED**self._num_steps) ** 0.5)
        torch._foreach_add_(sizes, _EPSILON)
        scale = lr / (1 - _BETA**self._num_steps)
        torch._foreach_addcdiv_(self._owned, self._means, sizes, value=-scale)
        for one in self._owned:
            one.grad = None
