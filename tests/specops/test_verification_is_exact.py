"""The promise of the whole system: whatever the drafter says, the target's distribution comes out.

Exact: every draft and every outcome is enumerated in float64 with the very functions that serving
calls, so there is no sampling noise and no tuned tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from specops.verify import acceptance, residual

V, K = 4, 3


def random_laws(seed: int, sharpness: float) -> dict[tuple[int, ...], torch.Tensor]:
    """A distribution over V tokens after every context of up to K tokens; some entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    laws = {}
    for length in range(K + 1):
        for context in itertools.product(range(V), repeat=length):
            logits = sharpness * torch.randn(V, generator=generator, dtype=torch.float64)
            law = logits.softmax(0)
            if torch.rand((), generator=generator) < 0.3:
                law[int(torch.randint(V, (), generator=generator))] = 0
            laws[context] = law / law.sum()
    return laws


def joint(laws: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Probability of every sequence of K + 1 tokens, [V] * (K + 1)."""
    out = torch.zeros([V] * (K + 1), dtype=torch.float64)
    for tokens in itertools.product(range(V), repeat=K + 1):
        out[tokens] = torch.stack([laws[tokens[:i]][t] for i, t in enumerate(tokens)]).prod()
    return out


def emitted(p, q, delta: bool, length_after) -> torch.Tensor:
    """Law of the first K + 1 tokens when one round is followed by plain decoding.

    ``length_after(prefix)``: how many tokens are drafted, a function of what was drafted before.
    """
    out = torch.zeros([V] * (K + 1), dtype=torch.float64)
    for draft in itertools.product(range(V), repeat=K):
        weight = torch.ones((), dtype=torch.float64)
        for i, token in enumerate(draft):
            weight = weight * q[draft[:i]][token]
        if weight == 0:
            continue
        num_draft = next((n for n in range(K) if length_after(draft[:n]) == n), K)
        p_rows = torch.stack([p[draft[:i]] for i in range(K)])[None]
        q_rows = None if delta else torch.stack([q[draft[:i]] for i in range(K)])[None]
        keep = acceptance(p_rows, q_rows, torch.tensor([draft]))[0][0]
        survived = weight
        for i in range(num_draft + 1):
            if i == num_draft:
                spread(out, draft[:i], p[draft[:i]], survived, p)
                break
            law_q = q[draft[:i]]
            if delta:
                law_q = torch.zeros(V, dtype=torch.float64)
                law_q[draft[i]] = 1
            rest = residual(p[draft[:i]], law_q)
            spread(out, draft[:i], rest, survived * (1 - keep[i]), p)
            survived = survived * keep[i]
    return out


def spread(out, prefix, law, weight, p) -> None:
    """Add ``weight``: the next token follows ``law``, the rest plain decoding."""
    for tail in itertools.product(range(V), repeat=K + 1 - len(prefix)):
        tokens = prefix + tail
        chance = weight * law[tail[0]]
        for i in range(len(prefix) + 1, K + 1):
            chance = chance * p[tokens[:i]][tokens[i]]
        out[tokens] += chance


def always_all(prefix):
    return K


def stop_on_even(prefix):
    """Adaptive length that looks at drafted tokens before the one it decides on."""
    return len(prefix) if prefix and prefix[-1] % 2 == 0 else K


def one_hot(laws):
    return {
        c: torch.nn.functional.one_hot(law.argmax(), V).to(torch.float64) for c, law in laws.items()
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_after", [always_all, stop_on_even])
@pytest.mark.parametrize(
    ("sharpness", "delta"),
    [
        pytest.param(0.5, False, id="drafter disagrees mildly"),
        pytest.param(4.0, False, id="drafter is opposed and sharp"),
        pytest.param(1.0, True, id="delta draft"),
    ],
)
def test_emitted_tokens_follow_the_target(seed, length_after, sharpness, delta):
    p = random_laws(seed, 1.5)
    q = random_laws(seed + 100, sharpness)
    if delta:
        q = one_hot(q)

    difference = (emitted(p, q, delta, length_after) - joint(p)).abs().sum() / 2

    assert difference <= 1e-12


def test_emitted_tokens_follow_the_target_when_the_drafter_is_the_target():
    p = random_laws(0, 1.5)

    assert (emitted(p, p, False, always_all) - joint(p)).abs().sum() / 2 <= 1e-12


def test_a_rule_that_redraws_from_the_target_after_a_rejection_is_seen(monkeypatch):
    """Mutant: resample from p instead of the residual (a bug other engines shipped)."""
    p, q = random_laws(1, 1.5), random_laws(101, 1.5)
    monkeypatch.setitem(globals(), "residual", lambda p_law, q_law: p_law)

    assert (emitted(p, q, False, always_all) - joint(p)).abs().sum() / 2 > 1e-3


def test_a_length_that_depends_on_the_drawn_token_itself_is_seen():
    """Mutant: drop token j because of its own value; the law of the output moves."""
    p, q = random_laws(2, 1.5), random_laws(102, 1.5)
    out = torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        dropped = token == int(q[()].argmax())
        keep = acceptance(p[()][None, None], q[()][None, None], torch.tensor([[token]]))[0][0, 0]
        rest = p[()] if dropped else residual(p[()], q[()])
        kept = torch.zeros(()) if dropped else keep
        out += q[()][token] * (1 - kept) * rest
        out[token] += q[()][token] * kept

    assert (out - p[()]).abs().sum() / 2 > 1e-3
