"""Biases and penalties equal their definition in plain Python, one token at a time."""

from __future__ import annotations

import random

import torch

from oracles.packed_penalties import Adjustments, adjust_logits, token_lists
from oracles.plain_reference import adjusted

V = 12


def request(numbers):
    """Random (prompt, completion, presence, frequency, repetition, biases); many are neutral."""
    return (
        [numbers.randrange(V) for _ in range(numbers.randrange(6))],
        [numbers.randrange(V) for _ in range(numbers.randrange(6))],
        numbers.choice((0.0, numbers.uniform(-2, 2))),
        numbers.choice((0.0, numbers.uniform(-2, 2))),
        numbers.choice((1.0, numbers.uniform(0.3, 3))),
        {t: numbers.uniform(-9, 9) for t in numbers.sample(range(V), numbers.randrange(4))},
    )


def pack(requests, rows):
    prompts, completions, presence, frequency, repetition, biases = zip(*requests, strict=True)
    return Adjustments(
        rows_A=torch.tensor(rows),
        presence_A=torch.tensor(presence, dtype=torch.float64),
        frequency_A=torch.tensor(frequency, dtype=torch.float64),
        repetition_A=torch.tensor(repetition, dtype=torch.float64),
        prompt=token_lists(prompts),
        generated=token_lists(completions),
        biased=token_lists([list(b) for b in biases]),
        bias_T=torch.tensor([v for b in biases for v in b.values()], dtype=torch.float64),
    )


def logits_of(num_rows, num_query, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, num_query, V, generator=generator, dtype=dtype)


def drafts(num_rows, num_draft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (num_rows, num_draft), generator=generator)


def test_every_position_is_adjusted_by_what_stands_before_it():
    numbers = random.Random(0)
    for seed in range(50):
        num_draft = numbers.randrange(5)
        requests = [request(numbers) for _ in range(3)]
        logits, draft = logits_of(3, num_draft + 1, seed), drafts(3, num_draft, seed)

        got = adjust_logits(logits, draft, pack(requests, [0, 1, 2]))

        for r, (prompt, completion, *shape) in enumerate(requests):
            for j in range(num_draft + 1):
                before = completion + draft[r, :j].tolist()
                want = adjusted(logits[r, j].tolist(), prompt, before, *shape)
                want = torch.tensor(want, dtype=torch.float64)
                torch.testing.assert_close(got[r, j], want, rtol=1e-12, atol=1e-12)


def test_a_draft_gives_the_bits_that_its_tokens_would_give_when_committed():
    """In float32, as served: speculation must not even change a rounding."""
    numbers = random.Random(1)
    logits, draft = logits_of(1, 5, dtype=torch.float32), drafts(1, 4)
    prompt, completion, _, _, _, bias = request(numbers)
    shape = (0.7, 0.3, 1.3, bias)

    drafted = adjust_logits(logits, draft, pack([(prompt, completion, *shape)], [0]))

    nothing = torch.zeros((1, 0), dtype=torch.int64)
    for j in range(5):
        committed = completion + draft[0, :j].tolist()
        plain = adjust_logits(
            logits[:, j : j + 1], nothing, pack([(prompt, committed, *shape)], [0])
        )
        assert torch.equal(drafted[:, j : j + 1], plain)


def test_other_rows_and_the_logits_that_came_in_keep_their_bits():
    numbers = random.Random(2)
    logits, draft = logits_of(4, 3, dtype=torch.float32), drafts(4, 2)
    before = logits.clone()

    got = adjust_logits(logits, draft, pack([([1], [2], 1.0, 1.0, 2.0, {3: 5.0})], [2]))

    assert torch.equal(logits, before)
    assert torch.equal(got[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(got[2], before[2])
    assert got.dtype == torch.float32
    neutral = pack([(request(numbers)[0], [1, 1], 0.0, 0.0, 1.0, {})], [2])
    assert torch.equal(adjust_logits(logits, draft, neutral), before)
