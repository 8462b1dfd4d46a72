"""A pass of a few layers calls the same operations in the same shapes as one of all layers, so it
finds every kernel that these launch."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from targets.fused import FusedDecoder
from targets.target import KvPool
from tests.targets.test_fused import gemma3, llama, qwen3

LAYERS = 9
ROWS = 6
WINDOWS = [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 3]


def described(value):
    """What a kernel is specialised for."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16
    if is_dataclass(value):
        return tuple(described(getattr(value, field.name)) for field in fields(value))
    return repr(value)


class Watched:
    """A decoder that notes its calls."""

    def __init__(self, model, few_rows):
        self.decoder = FusedDecoder(model, 64, few_rows=few_rows, packs=False)
        self.calls, self.layers = [], []
        plain = self.decoder._operations
        noting = {field.name: self.noting(field.name, getattr(plain, field.name))
                  for field in fields(plain)}  # fmt: skip
        self.decoder._operations = replace(plain, **noting)
        self.decoder._gate = self.noting("gate", self.decoder._gate)
        config = model.config
        self.pool = KvPool(LAYERS, 64, config.num_key_value_heads, config.head_dim, torch.float32,
                           torch.device("cpu"))  # fmt: skip

    def noting(self, name, operation):
        def call(*args, **named):
            more = sorted((key, described(value)) for key, value in named.items())
            self.calls.append((name, *map(described, args), *more))
            return operation(*args, **named)

        return call

    def run(self, taps):
        self.calls.clear()
        self.layers.clear()

        def attend(layer, q):
            self.layers.append(layer)
            self.calls.append(("attend", self.decoder.layers[layer].window, described(q)))
            return q

        at = torch.arange(ROWS)
        return self.decoder.forward(at, at, at, attend, self.pool, taps)


@pytest.mark.parametrize("few_rows", [0, ROWS], ids=["many rows", "few rows"])
@pytest.mark.parametrize("taps", [(), (2, 6), (0, 4, LAYERS)])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: llama(num_hidden_layers=LAYERS), id="Llama"),
        pytest.param(lambda: qwen3(num_hidden_layers=LAYERS), id="Qwen3"),
        pytest.param(
            lambda: gemma3(num_hidden_layers=LAYERS, layer_types=WINDOWS), id="Gemma 3, one other"
        ),
    ],
)
def test_an_abridged_pass_calls_what_a_whole_one_calls(model, taps, few_rows):
    watched = Watched(model(), few_rows)
    whole = [tensor.clone() for tensor in watched.run(taps)]
    calls, num_layers = set(watched.calls), len(watched.layers)

    with watched.decoder.abridged(taps):
        watched.run(taps)
    assert set(watched.calls) == calls
    assert num_layers == LAYERS and len(watched.layers) <= 7

    again = watched.run(taps)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert watched.layers == list(range(LAYERS))
