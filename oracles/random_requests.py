"""Requests that use every sampling field, and their answers, which must not depend on drafts.
Engines compute in float64, so that rounding never decides between two tokens.

Comparisons exclude ``speculation``, which says how the answer was decoded, and ``cached_tokens``,
which depends on the other requests.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from drafters.eagle3.model import Eagle3, config_for_target
from drafters.protocol import weights_were_overwritten
from oracles.engines import Collected, make_engine
from serving.engine.loop import Engine
from serving.requests import Request, SamplingParams, TokenLogprob

TOLERANCE = 1e-9
"""Tolerance of log probabilities; float64 batches of different shapes differ by about 1e-13."""
NUM_EOS = 3
DRAFTERS = ("random", "hostile", "echo")
"""Random weights; the negated target head applied to the target's hidden row, which proposes the
least likely token; the target head itself, which repeats the prediction for the previous token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything in a response that a client may rely on."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...]
    num_prompt_tokens: int

    @classmethod
    def of(cls, collected: Collected) -> Answer:
        last = collected.last
        assert last is not None
        return cls(
            tuple(collected.token_ids),
            collected.text,
            last.finish_reason,
            tuple(collected.logprobs),
            last.num_prompt_tokens,
        )


def parted_in(one: Answer, other: Answer, tolerance: float = TOLERANCE) -> list[str]:
    """Fields in which two answers differ.

    Args:
        tolerance: for log probabilities; 0: they must be bitwise equal.
    """
    names = [field.name for field in fields(Answer) if field.name != "logprobs"]
    parted = [name for name in names if getattr(one, name) != getattr(other, name)]
    pairs = zip(one.logprobs, other.logprobs, strict=False)
    if len(one.logprobs) != len(other.logprobs) or not all(
        _same_logprob(*pair, tolerance) for pair in pairs
    ):
        parted.append("logprobs")
    return parted


def _same_logprob(one: TokenLogprob, other: TokenLogprob, tolerance: float) -> bool:
    values = [one.logprob, *(value for _, value in one.top)]
    others = [other.logprob, *(value for _, value in other.top)]
    return (
        [one.token_id, *(token for token, _ in one.top)]
        == [other.token_id, *(token for token, _ in other.top)]
    ) and all(abs(a - b) <= tolerance for a, b in zip(values, others, strict=True))


def differing(wanted: dict[str, Answer], got: dict[str, Answer]) -> list[str]:
    """Ids of requests whose answers differ."""
    assert wanted.keys() == got.keys()
    return [name for name, answer in wanted.items() if parted_in(answer, got[name])]


def random_requests(numbers: random.Random, count: int, vocab_size: int) -> list[Request]:
    """Greedy and seeded requests, without stops (``with_ends`` adds them). Some share prefixes, and
    some contain repetitions, so that the suffix index can draft."""
    stem = [numbers.randrange(vocab_size) for _ in range(24)]
    return [
        Request(str(i), tuple(_prompt(numbers, stem, vocab_size)), _sampling(numbers, vocab_size))
        for i in range(count)
    ]


def _prompt(numbers: random.Random, stem: list[int], vocab_size: int) -> list[int]:
    own = [numbers.randrange(vocab_size) for _ in range(numbers.randint(1, 10))]
    return stem[: numbers.choice((0, 0, 8, 24))] + own * numbers.choice((1, 1, 3))


def _sampling(numbers: random.Random, vocab_size: int) -> SamplingParams:
    def sometimes(value: Any, neutral: Any) -> Any:
        return value if numbers.random() < 0.3 else neutral

    def biases() -> tuple[tuple[int, float], ...]:
        tokens = numbers.sample(range(vocab_size), numbers.randint(1, 8))
        return tuple((token, numbers.uniform(-100, 20)) for token in tokens)

    return SamplingParams(
        temperature=numbers.choice((0.0, 0.3, 0.7, 1.0, 1.5)),
        top_p=sometimes(numbers.uniform(0.3, 1.0), 1.0),
        top_k=sometimes(numbers.randint(1, 20), None),
        min_p=sometimes(numbers.uniform(0.0, 0.3), 0.0),
        seed=numbers.randrange(1 << 63),
        max_tokens=numbers.randint(1, 28),
        ignore_eos=numbers.random() < 0.5,
        logprobs=sometimes(numbers.randint(0, 5), None),
        presence_penalty=sometimes(numbers.uniform(-2, 2), 0.0),
        frequency_penalty=sometimes(numbers.uniform(-2, 2), 0.0),
        repetition_penalty=sometimes(numbers.uniform(0.5, 2.0), 1.0),
        logit_bias=sometimes(biases(), ()),
    )


def with_ends(numbers: random.Random, request: Request, answer: Answer) -> Request:
    """Add stops that occur, or almost occur, in the answer to about half of the requests."""
    stops, stop_ids = [], []
    if numbers.random() < 0.3 and answer.text:
        start = numbers.randrange(len(answer.text))
        stop = answer.text[start : start + numbers.randint(1, 4)]
        stops = ["never there", numbers.choice((stop, stop + "x", stop))]
    if numbers.random() < 0.2:
        stop_ids = [numbers.choice(answer.token_ids)]
    shape = replace(request.sampling, stop=tuple(stops), stop_token_ids=tuple(stop_ids))
    return replace(request, sampling=shape)


def twice(requests: Iterable[Request]) -> list[Request]:
    """Every request twice; the second time the suffix index has seen the answer."""
    every = list(requests)
    return every + [replace(request, id=f"{request.id} again") for request in every]


SHAPINGS: tuple[dict[str, Any], ...] = (
    {},
    {"presence_penalty": 1.9},
    {"presence_penalty": -1.5, "frequency_penalty": 0.6},
    {"frequency_penalty": 1.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"logit_bias": ((7, 100.0), (8, 97.0), (9, -100.0))},
    {"presence_penalty": 1.0, "repetition_penalty": 1.5, "logit_bias": ((3, 4.0), (90, 5.5))},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
)


def every_shape() -> Iterator[Request]:
    """One request per shaping and temperature; 8 tokens each."""
    for number, (shaping, temperature) in enumerate(itertools.product(SHAPINGS, (0.0, 1.0))):
        sampling = SamplingParams(
            temperature=temperature, seed=number, max_tokens=8, ignore_eos=True, **shaping
        )
        yield Request(str(number), (5, 6, 5, 6, number), sampling)


def exact_engine(model: Any, kind: str, **options: Any) -> Engine:
    """An engine over a float64 ``model`` with a drafter of ``DRAFTERS``; see ``make_engine``."""
    top = model.config.num_hidden_layers
    config = config_for_target(model.config, layer_ids=None if kind == "random" else (top,))
    drafter = Eagle3(config)
    drafter.initialise(1, model.get_output_embeddings().weight.float())
    if kind != "random":
        _echo(drafter, model, 1.0 if kind == "echo" else -1.0)
    model = copy.deepcopy(model)  # an engine replaces its attention
    return make_engine(model, drafter=drafter.double(), num_pages=900, **options)


@torch.no_grad()
def _echo(drafter: Eagle3, model: Any, sign: float) -> None:
    drafter.fc.weight.copy_(torch.eye(len(drafter.fc.weight)))
    drafter.o_proj.weight.zero_()
    drafter.down_proj.weight.zero_()
    drafter.norm.weight.copy_(model.model.norm.weight)
    drafter.lm_head.weight.copy_(sign * model.lm_head.weight)


def scramble(engine: Engine, step: int) -> None:
    """Replace the drafter's weights with random ones in place, as a swap does."""
    neural = engine.drafting.neural["eagle3"].drafter
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in neural.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.1 * noise)
        weights_were_overwritten(neural)
    neural.version += 1
