"""The replay environment keeps to Gymnasium's API, and pays what the log says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from policies.budgets import BudgetScores
from policies.features import NAMES, NUM_FEATURES, Features
from policies.network import SIZE_NAMES
from policies.replay_environment import ReplayEnvironment, SizeEnvironment
from policies.replayed_log import ReplayedLog
from tests.policies import confident_logs
from tests.policies.confident_logs import confident_log
from tests.policies.logs import DRAFTER, MAX_DRAFT, any_k, log, profile
from trainer.gymnasium_env import ReplayGym

LOG = ReplayedLog.of(log(300, any_k, (1, 8)), DRAFTER, profile(), MAX_DRAFT)


def test_gymnasium_accepts_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is no human to render for
        check_env(ReplayGym(ReplayEnvironment(LOG)), skip_render_check=True)


@pytest.mark.parametrize("k", [0, 3, MAX_DRAFT])
def test_rewards_are_the_speed_over_plain_decoding(k):
    environment = ReplayEnvironment(LOG, episode_steps=20)
    environment.reset(options={"start": 100})
    for at in range(100, 120):
        observation, reward, terminated, truncated, info = environment.step(k)
        assert environment.observation_space.contains(observation)
        tokens, seconds = LOG.tokens[at, k], LOG.seconds[at, k]
        assert (info["tokens"], info["seconds"]) == (tokens, seconds)
        plain = LOG.tokens[at, 0] / LOG.seconds[at, 0]
        assert reward == pytest.approx(tokens / seconds / plain)
        assert (terminated, truncated) == (False, at == 119)


def test_the_sum_of_advantages_is_what_a_policy_gains_over_a_speed():
    """At the best fixed K's own speed, its advantages add up to nothing."""
    rows = LOG.sizes == 0
    speed = LOG.tokens[rows, 4].sum() / LOG.seconds[rows, 4].sum()
    only = LOG.rows(rows)
    environment = ReplayEnvironment(
        only, episode_steps=len(only.steps), reward="advantage", speeds=[speed]
    )
    environment.reset(options={"start": 0})
    total = sum(environment.step(4)[1] for _ in only.steps)
    assert total == pytest.approx(0, abs=1e-6)


def test_episodes_are_the_same_for_one_seed():
    def play(seed):
        environment = ReplayEnvironment(LOG, episode_steps=40, seed=seed)
        first, info = environment.reset(seed=seed)
        return info["step"], [first.tolist(), *(environment.step(5)[0].tolist() for _ in range(30))]

    assert play(1) == play(1)
    assert play(1) != play(2)


def test_features_know_nothing_of_the_step_to_come():
    """Two logs that differ in one step's outcome have the same features up to that step."""
    other = log(300, any_k, (1, 8), seed=0)
    changed = list(other)
    rows = tuple(
        type(row)(8, 8 - row.num_accepted % 2, group=row.group) for row in changed[150].rows
    )
    changed[150] = type(changed[150])(DRAFTER, 8, 8, 1.0, "test", 0, 0.02, rows)
    twin = ReplayedLog.of(changed, DRAFTER, profile(), MAX_DRAFT, LOG.hazards)
    seen = []
    for one in (LOG, twin):
        environment = ReplayEnvironment(one, episode_steps=20, warm_steps=0, seed=3)
        first, _ = environment.reset(seed=3, options={"start": 145})
        # K = 0: nothing is drawn, so only the outcomes themselves could differ.
        rest = [environment.step(0)[0] for _ in range(5)]
        seen.append(np.stack([first, *rest]))
    assert np.array_equal(*seen)


def test_no_k_beyond_the_largest_is_played():
    environment = ReplayEnvironment(LOG)
    environment.reset()
    for action in (-1, MAX_DRAFT + 1, 1.5):
        with pytest.raises(ValueError, match=r"K must be in 0\.\.8"):
            environment.step(action)
    with pytest.raises(ValueError, match="without steps"):
        ReplayEnvironment(LOG.rows(np.zeros(300, np.bool_)))


def test_features_follow_acceptance():
    features = Features(MAX_DRAFT)
    before = features.vector(1, [1.0, 1.1, 1.2])
    for _ in range(200):
        features.observe(4, [4], [4])
    after = features.vector(1, [1.0, 1.1, 1.2])
    assert len(before) == len(after) == NUM_FEATURES
    assert after[6] > 0.95 and after[4] == pytest.approx(5 / 8, abs=0.01)


# ---- two decisions -------------------------------------------------------------------------------

CUT_LOG = ReplayedLog.of(
    confident_log(200, batch=4, threshold=0.0, share=1.0),
    DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT,
)  # fmt: skip
BUDGETS = BudgetScores.of(CUT_LOG, 4)


def test_gymnasium_accepts_the_environment_of_a_size():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is no human to render for
        inner = SizeEnvironment(CUT_LOG, BUDGETS, lambda _: 4)
        check_env(ReplayGym(inner), skip_render_check=True)


@pytest.mark.parametrize("share", [0, 2, 3])
def test_a_size_is_paid_by_the_k_of_its_frozen_partner(share):
    seen = []

    def draft_k(features):
        seen.append(features)
        return 2 + len(seen) % 3

    environment = SizeEnvironment(CUT_LOG, BUDGETS, draft_k, episode_steps=20)
    observation, _ = environment.reset(options={"start": 50})
    for at in range(50, 70):
        k = 2 + len(seen) % 3
        assert observation[SIZE_NAMES.index("draft_k")] == pytest.approx(k / CUT_LOG.max_draft)
        assert observation[:NUM_FEATURES].tolist() == pytest.approx(seen[-1])
        observation, reward, _, truncated, info = environment.step(share)
        tokens, seconds = BUDGETS.tokens[at, k, share], BUDGETS.seconds[at, k, share]
        assert (info["tokens"], info["seconds"]) == (tokens, seconds)
        assert reward == pytest.approx(tokens / seconds / CUT_LOG.plain_rate[at])
        assert truncated is (at == 69)
    with pytest.raises(ValueError, match=r"the share must be in 0\.\.3"):
        environment.step(4)


def test_k_is_paid_by_the_share_that_its_frozen_partner_chooses():
    asked = []

    def share(inputs):
        asked.append(inputs)
        return len(asked) % 4

    environment = ReplayEnvironment(CUT_LOG, episode_steps=20, budgets=BUDGETS, share=share)
    environment.reset(options={"start": 0})
    for at in range(20):
        before = len(asked)
        k = at % (CUT_LOG.max_draft + 1)
        _, reward, _, _, info = environment.step(k)
        assert len(asked) == before + (k > 0), "nothing is asked where nothing is drafted"
        chosen = len(asked) % 4 if k else 3
        tokens, seconds = BUDGETS.tokens[at, k, chosen], BUDGETS.seconds[at, k, chosen]
        assert (info["tokens"], info["seconds"]) == (tokens, seconds)
        assert reward == pytest.approx(tokens / seconds / CUT_LOG.plain_rate[at])
        if k:
            assert len(asked[-1]) == len(SIZE_NAMES)


def test_features_see_what_a_cut_left():
    """As a server tells its policy: only what was verified."""
    loses = BUDGETS.tokens[:, 5, 0] < BUDGETS.tokens[:, 5, 3] - 3
    at = int(np.flatnonzero(loses)[0])
    for share in (0, 3):
        environment = SizeEnvironment(CUT_LOG, BUDGETS, lambda _: 5, episode_steps=2, warm_steps=0)
        environment.reset(options={"start": at})
        after = environment.step(share)[0]
        kept = (BUDGETS.tokens[at, 5, share] / 4 - 1) / CUT_LOG.max_draft
        assert after[NAMES.index("last_accepted")] == pytest.approx(kept)
