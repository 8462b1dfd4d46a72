"""What the engine tells a policy of its requests: whose they are, how they sample, how long they
are."""

from __future__ import annotations

import pytest

from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.groups import NUM_CLASSES, group_of
from serving.engine.grouping import Grouping, Tenants
from serving.engine.loop import Engine


class Asked(RandomPolicy):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.seen, self.outcomes = [], []

    def plan(self, obs):
        self.seen.append(obs)
        return super().plan(obs)

    def observe(self, outcome):
        self.outcomes.append(outcome)


def request(name, temperature=0.0, max_tokens=12, **own):
    return request_of(name, [5, 6, 7, 8], max_tokens, temperature=temperature, **own)


@pytest.mark.parametrize("overlaps", [True, False])
def test_plans_and_outcomes_tell_the_groups_of_the_requests(overlaps):
    policy = Asked()
    parts = make_engine(random_model("qwen3"), overlaps=overlaps).parts
    requests = [
        request("0"), request("1", 1.0), request("2", tenant="ours", max_tokens=30),
    ]  # fmt: skip
    run(Engine(parts, policy), requests)

    every = {group_of(0, 0.0), group_of(0, 1.0), group_of(1, 0.0)}
    assert {group for obs in policy.seen for group in obs.groups} == every
    assert all(len(obs.groups) == obs.batch for obs in policy.seen)
    assert all(len(o.rows.groups) == len(o.rows) for o in policy.outcomes)
    assert set(policy.outcomes[-1].rows.groups) == {group_of(1, 0.0)}, "the others have ended"
    assert all(obs.context in range(5, 34) for obs in policy.seen)
    assert all(outcome.context in range(5, 34) for outcome in policy.outcomes)


class Row:
    """As much of a ``Sequence`` as is asked for."""

    def __init__(self, group, num_tokens):
        self.group, self.tokens = group, [0] * num_tokens


def test_what_is_told_of_a_batch_is_kept_while_it_is_the_same_and_its_texts_grow():
    grouping, batch = Grouping(), [Row(0, 100), Row(2, 200)]
    first = grouping.of(batch)
    assert first == (b"\0\2", 150)
    batch[0].tokens += [0] * 100
    assert grouping.of(list(batch)) is first
    for _ in range(20):
        later = grouping.of(batch)
    assert later.context == 200
    assert later.groups is first.groups
    assert grouping.of(batch[1:]) == (b"\2", 200)
    assert grouping.of([]).groups == b""


def test_nobody_in_particular_has_no_number_and_domains_of_one_tenant_have_their_own():
    grouping = Grouping()
    groups = [
        grouping.group(request("0")),
        grouping.group(request("1", tenant="ours")),
        grouping.group(request("2", tenant="ours", domain="code")),
        grouping.group(request("3", 1.0, tenant="ours")),
    ]
    assert [group // NUM_CLASSES for group in groups] == [0, 1, 2, 1]
    assert groups[3] != groups[1]


def test_those_who_send_most_have_numbers_and_a_number_is_not_given_away_soon():
    tenants = Tenants()
    first = {tenants.number(f"first {i}") for i in range(16)}
    assert first == set(range(1, 17))
    assert tenants.number("late") == 0

    for _ in range(8):
        late = tenants.number("late")
    assert late not in first and late
    given = [late]
    for i in range(60):
        for _ in range(20 + 10 * i):
            number = tenants.number(f"later {i}")
        given.append(number)
    assert len(set(given[:40])) == 40, "the policy has forgotten a tenant by then"
    assert all(1 <= number < 64 for number in given)


def test_many_users_of_one_request_each_take_no_memory():
    tenants = Tenants()
    for i in range(20_000):
        tenants.number(str(i))
    assert len(tenants._counts) < 2000
