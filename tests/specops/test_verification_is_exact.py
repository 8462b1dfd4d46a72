"""The system's main guarantee: whatever the drafter proposes, outputs follow the target.

Exact: every draft and every outcome is enumerated in float64 with the functions that serving calls,
so there is no sampling noise and no tuned tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from specops.verify import acceptance, block_acceptance, residual, verify_block

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


def drafts(q, length_after):
    """Every draft of K tokens: (tokens, probability, number of verified tokens)."""
    for draft in itertools.product(range(V), repeat=K):
        weight = torch.stack([q[draft[:i]][token] for i, token in enumerate(draft)]).prod()
        num_draft = next((n for n in range(K) if length_after(draft[:n]) == n), K)
        if weight > 0:
            yield draft, weight, num_draft


def rows(p, q, draft, delta):
    """p [1, K, V] and q likewise, or ``None``, along a draft."""
    p_rows = torch.stack([p[draft[:i]] for i in range(K)])[None]
    return p_rows, None if delta else torch.stack([q[draft[:i]] for i in range(K)])[None]


def drafted_law(q, draft, place, delta):
    if not delta:
        return q[draft[:place]]
    return torch.nn.functional.one_hot(torch.tensor(draft[place]), V).double()


def emitted(p, q, delta: bool, length_after) -> torch.Tensor:
    """Law of the first K + 1 tokens when one round is followed by plain decoding.

    ``length_after(prefix)``: draft length as a function of the tokens drafted before.
    """
    out = torch.zeros([V] * (K + 1), dtype=torch.float64)
    futures = decoded_plainly(p)
    for draft, weight, num_draft in drafts(q, length_after):
        keep = acceptance(*rows(p, q, draft, delta), torch.tensor([draft]))[0][0]
        survived = weight
        for i in range(num_draft + 1):
            if i == num_draft:
                spread(out, draft[:i], p[draft[:i]], survived, futures)
                break
            rest = residual(p[draft[:i]], drafted_law(q, draft, i, delta))
            spread(out, draft[:i], rest, survived * (1 - keep[i]), futures)
            survived = survived * keep[i]
    return out


def emitted_by_block(p, q, delta: bool, length_after) -> torch.Tensor:
    """The same under block verification, where the last accepted position counts."""
    out = torch.zeros([V] * (K + 1), dtype=torch.float64)
    futures = decoded_plainly(p)
    for draft, weight, num_draft in drafts(q, length_after):
        p_rows, q_rows = rows(p, q, draft, delta)
        lens = torch.tensor([num_draft])
        h, pi, _ = block_acceptance(p_rows, q_rows, torch.tensor([draft]), lens)
        not_later = weight
        for i in range(num_draft, -1, -1):
            taken = h[0, i - 1] if i else 1.0
            law = p[draft[:i]]
            if i < num_draft:
                law = residual(law, drafted_law(q, draft, i, delta), pi[0, i])
            spread(out, draft[:i], law, not_later * taken, futures)
            not_later = not_later * (1 - taken)
    return out


def mean_kept(p, q, delta: bool) -> tuple[float, float]:
    """Expected number of kept draft tokens by the standard rule and by block verification."""
    standard = block = 0.0
    for draft, weight, num_draft in drafts(q, always_all):
        p_rows, q_rows = rows(p, q, draft, delta)
        ids = torch.tensor([draft])
        keep = acceptance(p_rows, q_rows, ids)[0][0]
        standard += float(weight * keep.cumprod(0).sum())
        h, _, _ = block_acceptance(p_rows, q_rows, ids, torch.tensor([num_draft]))
        not_later = 1.0
        for i in range(K, 0, -1):
            block += float(weight * not_later * h[0, i - 1] * i)
            not_later = not_later * (1 - h[0, i - 1])
    return standard, block


def decoded_plainly(p) -> dict[tuple[int, ...], torch.Tensor]:
    """Context -> probability of all that follows it up to K + 1 tokens, given the next token;
    [V] * (K + 1 - length of the context)."""
    futures: dict[tuple[int, ...], torch.Tensor] = {}
    for context in sorted(p, key=len, reverse=True):
        after = [(*context, token) for token in range(V)]
        one = torch.ones((), dtype=torch.float64)
        futures[context] = torch.stack(
            [weighted(p[c], futures[c]) if c in futures else one for c in after]
        )
    return futures


def weighted(law, futures) -> torch.Tensor:
    """Probability of a token by ``law`` and of what follows it."""
    return law.view(V, *[1] * (futures.dim() - 1)) * futures


def spread(out, prefix, law, weight, futures) -> None:
    """Add ``weight`` to the outcomes: the next token follows ``law``, then plain decoding."""
    out[prefix] += weight * weighted(law, futures[prefix])


def always_all(prefix):
    return K


def stop_on_even(prefix):
    """Adaptive length, decided by the draft tokens before the position in question."""
    return len(prefix) if prefix and prefix[-1] % 2 == 0 else K


def one_hot(laws):
    return {
        c: torch.nn.functional.one_hot(law.argmax(), V).to(torch.float64) for c, law in laws.items()
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("law_of_output", [emitted, emitted_by_block])
@pytest.mark.parametrize("length_after", [always_all, stop_on_even])
@pytest.mark.parametrize(
    ("sharpness", "delta"),
    [
        pytest.param(0.5, False, id="drafter disagrees mildly"),
        pytest.param(4.0, False, id="drafter is opposed and sharp"),
        pytest.param(1.0, True, id="delta draft"),
    ],
)
def test_emitted_tokens_follow_the_target(seed, law_of_output, length_after, sharpness, delta):
    p = random_laws(seed, 1.5)
    q = random_laws(seed + 100, sharpness)
    if delta:
        q = one_hot(q)

    difference = (law_of_output(p, q, delta, length_after) - joint(p)).abs().sum() / 2

    assert difference <= 1e-12


@pytest.mark.parametrize("law_of_output", [emitted, emitted_by_block])
@pytest.mark.parametrize("length_after", [always_all, stop_on_even])
@pytest.mark.parametrize("certain", [{0}, {0, 1}, {1}, {1, 2}, {2}], ids=str)
def test_emitted_tokens_follow_the_target_if_some_positions_are_certain(
    law_of_output, length_after, certain
):
    """Tokens that are certain before drawn ones, between them and after them."""
    p, q = random_laws(5, 1.5), random_laws(105, 1.0)
    q |= {c: law for c, law in one_hot(q).items() if len(c) in certain}

    difference = (law_of_output(p, q, False, length_after) - joint(p)).abs().sum() / 2

    assert difference <= 1e-12


@pytest.mark.parametrize("law_of_output", [emitted, emitted_by_block])
def test_emitted_tokens_follow_the_target_when_the_drafter_is_the_target(law_of_output):
    p = random_laws(0, 1.5)

    assert (law_of_output(p, p, False, always_all) - joint(p)).abs().sum() / 2 <= 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sharpness", [0.5, 1.5, 4.0])
def test_block_verification_keeps_more_of_sampled_drafts(seed, sharpness):
    p, q = random_laws(seed, 1.5), random_laws(seed + 100, sharpness)

    standard, block = mean_kept(p, q, delta=False)

    assert block > standard


def test_block_verification_keeps_as_many_of_delta_drafts():
    p, q = random_laws(0, 1.5), one_hot(random_laws(100, 1.5))

    standard, block = mean_kept(p, q, delta=True)

    assert block == pytest.approx(standard, abs=1e-12)


def test_verify_block_draws_what_its_acceptance_says():
    """200,000 verifications of one draft match the exact probabilities."""
    num_rows = 200_000
    p, q = random_laws(3, 1.5), random_laws(103, 1.5)
    draft = next(d for d, _, _ in drafts(q, always_all))
    p_rows, q_rows = rows(p, q, draft, delta=False)
    p_all = torch.cat((p_rows, p[draft][None, None]), dim=1)
    lens = torch.tensor([2])
    h, pi, _ = block_acceptance(p_rows, q_rows, torch.tensor([draft]), lens)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(num_rows, K + 1, generator=generator, dtype=torch.float64)

    got = verify_block(
        p_all.expand(num_rows, -1, -1),
        q_rows.expand(num_rows, -1, -1),
        torch.tensor([draft]).expand(num_rows, -1),
        lens.expand(num_rows),
        u[:, :K],
        u[:, K],
    )

    wanted = torch.zeros(3, V, dtype=torch.float64)
    wanted[2] = h[0, 1] * p[draft[:2]]
    stop_1 = (1 - h[0, 1]) * h[0, 0]
    wanted[1] = stop_1 * residual(p[draft[:1]], q[draft[:1]], pi[0, 1])
    wanted[0] = (1 - h[0, 1]) * (1 - h[0, 0]) * residual(p[()], q[()], pi[0, 0])
    seen = torch.zeros(3, V, dtype=torch.float64)
    seen.index_put_((got.num_accepted_R, got.next_R), torch.ones(num_rows).double(), True)
    assert got.num_accepted_R.max() == 2
    assert (seen / num_rows - wanted).abs().sum() / 2 < 0.005


def test_a_rule_that_redraws_from_the_target_after_a_rejection_is_seen(monkeypatch):
    """Mutant: resample from p instead of the residual (a bug shipped by other engines)."""
    p, q = random_laws(1, 1.5), random_laws(101, 1.5)
    monkeypatch.setitem(globals(), "residual", lambda p_law, q_law: p_law)

    assert (emitted(p, q, False, always_all) - joint(p)).abs().sum() / 2 > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_block_rule_with_the_residual_of_the_standard_one_is_seen(seed, monkeypatch):
    """Mutant shipped by another engine; too small to detect below 4 by 3."""
    p, q = random_laws(seed, 1.5), random_laws(seed + 100, 1.5)
    right = residual
    monkeypatch.setitem(globals(), "residual", lambda p_law, q_law, pi=1.0: right(p_law, q_law))

    assert (emitted_by_block(p, q, False, always_all) - joint(p)).abs().sum() / 2 > 1e-3


def test_a_length_that_depends_on_the_drawn_token_itself_is_seen():
    """Mutant: drop token j depending on its own value, which changes the output's law."""
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
