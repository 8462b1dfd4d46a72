"""Each rule draws with the probabilities that it says, and the same after a restart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from buffer.records import Round, Rounds
from configs.choices import SettingsError
from configs.schema import TrainerSettings
from policies.draws.catalog import CATALOG, draw_rule
from policies.draws.interface import Pool, weighted_order
from policies.draws.surprise import LEAST, surprise_of

NUM_DRAWS = 20_000


def pool_of(count: int = 8, **columns: Any) -> Pool:
    """Samples of which the last two are older ones; the first half of one tenant, and so on."""
    values: dict[str, Any] = {
        "age_N": np.arange(count)[::-1],
        "visits_N": np.zeros(count, dtype=np.int64),
        "num_pieces_N": np.ones(count, dtype=np.int64),
        "is_recent_N": np.arange(count) < count - 2,
        "num_older": 10,
        "tenant_N": np.arange(count) // 5,
        "domain_N": np.minimum(np.arange(count), 2),
        "surprise_N": np.linspace(0, 0.9, count),
        **columns,
    }
    return Pool(**values)


def chi_square(found: np.ndarray[Any, Any], probabilities: Any) -> float:
    """In standard deviations of the statistic under the hypothesis, which is about normal."""
    wanted = np.asarray(probabilities) * found.sum()
    degrees = len(wanted) - 1
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


def first_drawn(name: str, pool: Pool, **settings: Any) -> np.ndarray[Any, Any]:
    """How often each sample was the first one."""
    rule, random = draw_rule(name), np.random.default_rng(5)
    trainer = TrainerSettings(draw=name, **settings)
    first = [rule(pool, trainer, random)[0] for _ in range(NUM_DRAWS)]
    return np.bincount(first, minlength=len(pool))


def share_of(weights: Any) -> Any:
    return np.asarray(weights) / np.sum(weights)


RULES = {
    "uniform": share_of(np.ones(8)),
    # 6 recent ones stand for themselves, 2 older ones for 10.
    "reservoir": share_of([1] * 6 + [5, 5]),
    "recency": share_of(0.5 ** (np.arange(8)[::-1] / 3)),
    "tenants": share_of([1 / 5] * 5 + [1 / 3] * 3),
    "domains": share_of([1, 1] + [1 / 6] * 6),
    "surprise": share_of(np.maximum(np.linspace(0, 0.9, 8), LEAST)),
}


@pytest.mark.parametrize("name", RULES)
def test_samples_are_drawn_as_often_as_the_rule_says(name: str) -> None:
    found = first_drawn(name, pool_of(), draw_half_life_traces=3)

    assert abs(chi_square(found, RULES[name])) < 5
    others = [rule for rule, share in RULES.items() if not np.allclose(share, RULES[name])]
    assert len(others) == 5 and all(chi_square(found, RULES[one]) > 50 for one in others)


def test_those_that_are_left_keep_their_proportions() -> None:
    """Exact probabilities of all orders of three samples, drawn without replacement."""
    weights, random = np.array([1.0, 2.0, 5.0]), np.random.default_rng(0)
    orders = [tuple(weighted_order(np.log(weights), random)) for _ in range(NUM_DRAWS)]

    wanted = {
        (a, b, 3 - a - b): weights[a] / 8 * weights[b] / (8 - weights[a])
        for a in range(3)
        for b in range(3)
        if a != b
    }
    found = np.array([orders.count(order) for order in wanted])
    assert sum(wanted.values()) == pytest.approx(1)
    assert abs(chi_square(found, list(wanted.values()))) < 5


def test_weights_beyond_the_range_of_floats_still_order() -> None:
    ages = np.array([0, 1_000_000, 2_000_000])
    order = draw_rule("recency")(
        pool_of(3, age_N=ages), TrainerSettings(draw_half_life_traces=1), np.random.default_rng(0)
    )
    assert order.tolist() == [0, 1, 2]


def test_an_older_sample_stands_for_itself_while_all_are_held() -> None:
    pool = pool_of(is_recent_N=np.ones(8, dtype=np.bool_), num_older=0)
    assert abs(chi_square(first_drawn("reservoir", pool), share_of(np.ones(8)))) < 5


def test_unknown_surprise_counts_as_the_others_do() -> None:
    pool = pool_of(4, surprise_N=np.array([0.2, 0.6, np.nan, 0.0]))
    mean = (0.2 + 0.6 + 0.0) / 3
    wanted = share_of([0.2, 0.6, mean, LEAST])
    assert abs(chi_square(first_drawn("surprise", pool), wanted)) < 5
    nothing = pool_of(4, surprise_N=np.full(4, np.nan))
    assert abs(chi_square(first_drawn("surprise", nothing), share_of(np.ones(4)))) < 5


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_each_sample_is_drawn_once_and_the_same_with_the_same_state(name: str, count: int) -> None:
    pool, rule, settings = pool_of(count), draw_rule(name), TrainerSettings(draw=name)
    random, again = np.random.default_rng(1), np.random.default_rng()
    rule(pool, settings, random)
    again.bit_generator.state = random.bit_generator.state

    orders = [rule(pool, settings, random).tolist() for _ in range(5)]

    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders == [rule(pool, settings, again).tolist() for _ in range(5)]


@pytest.mark.parametrize("wanted", [1, 7, 40, 99, 100, 200])
def test_the_front_of_an_order_is_the_same_whatever_is_left_out_behind_it(wanted: int) -> None:
    numbers = np.random.default_rng(1)
    columns = {
        "visits_N": numbers.integers(0, 5, 100),
        "num_pieces_N": numbers.integers(1, 4, 100),
    }
    whole, front = pool_of(100, **columns), pool_of(100, **columns, num_wanted=wanted)
    rule, one, other = draw_rule("turns"), np.random.default_rng(4), np.random.default_rng(4)

    for _ in range(20):
        order = rule(front, TrainerSettings(), one)
        assert order.tolist() == rule(whole, TrainerSettings(), other)[:wanted].tolist()
    assert one.bit_generator.state == other.bit_generator.state


def test_an_unknown_rule_is_named_with_the_nearest_known() -> None:
    with pytest.raises(SettingsError, match=r"trainer\.draw 'recent' is unknown.*'recency'"):
        draw_rule("recent")


# ---- surprise ------------------------------------------------------------------------------------


def one_round(anchor: int, drafter: str, p: Any, q: Any, accepted: int, drafted: int) -> Round:
    logs = tuple(-math.inf if x == 0 else math.log(x) for x in p)
    q_logs = None if q is None else tuple(math.log(x) for x in q)
    ids = tuple(range(drafted))
    return Round(anchor, drafter, 0, ids, q_logs, logs, accepted, 1, drafted, 1.0, 1, 0.01)


def test_surprise_is_the_mean_probability_of_rejection() -> None:
    rounds = Rounds.of(
        [
            one_round(0, "other", [0.5, 0.0], [0.9, 0.9, 0.9], 1, 3),
            one_round(2, "mine", [0.9, 0.2], [0.6, 0.8, 0.1], 1, 3),  # 0 and 0.75; one unverified
            one_round(4, "none", [], None, 0, 0),
            one_round(5, "mine", [0.4], None, 0, 2),  # no distribution: 0.6
            one_round(6, "mine", [1.0], [1.0], 1, 1),
        ]
    )
    assert surprise_of(rounds, "mine") == pytest.approx((0 + 0.75 + 0.6 + 0) / 4, abs=1e-6)
    assert surprise_of(rounds, "other") == pytest.approx((1 - 5 / 9 + 1) / 2, abs=1e-6)
    assert surprise_of(rounds, "none") is None
    assert surprise_of(rounds, "unheard of") is None
    assert surprise_of(Rounds.of(), "mine") is None


def test_surprise_estimates_one_minus_the_overlap() -> None:
    random = np.random.default_rng(2)
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    tokens = random.choice(3, size=4000, p=q)
    rounds = Rounds.of(
        one_round(i, "mine", [p[token]], [q[token]], 0, 1) for i, token in enumerate(tokens)
    )
    found = surprise_of(rounds, "mine")
    assert found == pytest.approx(1 - np.minimum(p, q).sum(), abs=0.02)  # 5 standard deviations
