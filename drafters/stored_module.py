"""Modules whose parameters are a bundle's tensors: compared with them, and made for serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from drafters.protocol import DrafterContext, Weights
from drafters.trainable import TargetShape
from targets.target import by_columns

M = TypeVar("M", bound=nn.Module)


def check_tensors(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes on the meta device, so that no weights are drawn or copied.

    Args:
        make: the module that a bundle's config describes.

    Raises:
        ValueError: the tensors are not its own.
    """
    with torch.device("meta"):
        model = make()
    try:
        model.load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"the tensors do not fit their config: {error}") from error


class StoredModule(Generic[M]):
    """The part of a ``drafters.trainable.Trainable``, which describes every method, that is the
    same for all drafters whose config says what their module is."""

    __slots__ = ()

    config_class: ClassVar[Any]
    """Has ``from_json`` and ``to_json``, ``target_vocab_size``, ``hidden_size`` and
    ``layer_ids``."""
    module_class: ClassVar[Any]
    """Made of a config alone, and keeps it as ``config``."""

    def load_model(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> M:
        """Reads bundles of any floating dtype."""
        self.check(config, tensors)
        model: M = self.module_class(self.config_class.from_json(config))
        model.load_state_dict(dict(tensors))
        return model

    def check(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See ``check_tensors``."""
        found = self.config_class.from_json(config)
        check_tensors(lambda: self.module_class(found), tensors)

    def target_shape(self, config: Mapping[str, Any]) -> TargetShape:
        """Vocabulary, hidden size and tapped layers of the target."""
        found = self.config_class.from_json(config)
        return TargetShape(found.target_vocab_size, found.hidden_size, found.layer_ids)

    def config_to_json(self, model: M) -> dict[str, Any]:
        """All fields of the config."""
        config: Any = model.config
        found: dict[str, Any] = config.to_json()
        return found

    def bundle_tensors(self, model: M) -> dict[str, Tensor]:
        """Parameters, and ``d2t`` of a reduced vocabulary."""
        return dict(model.state_dict())


def first_weights(context: DrafterContext) -> Weights:
    """What a drafter that learns begins with: published weights."""
    assert context.weights is not None, "a drafter that learns begins with published weights"
    return context.weights


def check_shape(context: DrafterContext, hidden_size: int, vocab_size: int) -> None:
    """Compare what a drafter was made for with the target.

    Raises:
        ValueError: they differ.
    """
    if (hidden_size, vocab_size) != (context.hidden_size, context.vocab_size):
        raise ValueError(
            f"the drafter is shaped for hidden size {hidden_size} and vocabulary {vocab_size}, the "
            f"target has {context.hidden_size} and {context.vocab_size}"
        )


def for_serving(make: Callable[[], M], context: DrafterContext) -> M:
    """The module with the first weights, on the device and in the dtype of the target."""
    with torch.device("meta"):  # drawing weights that are then replaced would take seconds
        module = make().requires_grad_(False).eval()
    module.load_state_dict(first_weights(context).tensors, assign=True)
    module.to(device=context.device, dtype=context.dtype)
    by_columns(module)
    return module
