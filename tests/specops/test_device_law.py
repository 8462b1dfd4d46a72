"""The joint law of tokens emitted through ``specops.device``, which programs call: definitions on a
CPU, compiled kernels on a GPU. ``benchmarks/lossless`` repeats this with 10 million samples."""

from __future__ import annotations

import pytest
import torch

from oracles.device_bugs import BUGS
from oracles.device_law import REDUCED, RIGHT, SMALL, WIDE, Faces, Layout, sample
from oracles.joint_law import (
    REGIMES,
    SETTINGS,
    Cut,
    Setting,
    expected_law,
    law_excess,
    tables_of,
)
from specops import draft_sampling, draft_sampling_triton, verify_logits, verify_logits_triton
from specops.rng import Stream, device_uniforms
from specops.verify_logits import Rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = SETTINGS[::4]
"""All draft lengths and temperatures, untruncated and with each truncation alone."""
BUGGY = Setting(temperature=1.5, cut=Cut.NOTHING, num_draft=2)


def excess(setting, regime, rule, num_samples, seed=0, **options):
    tables = tables_of(regime)
    counts, _ = sample(setting, tables, rule, num_samples, seed=seed, **options)
    return law_excess(counts, expected_law(setting, tables))


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("regime", REGIMES)
def test_the_joint_law_is_the_targets(regime, rule):
    for number, setting in enumerate(FEW):
        found = excess(setting, regime, rule, 6_000, number)
        assert found < 1, f"{setting.name}: {found:.2f}"


@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_a_drafter_may_know_fewer_tokens(rule):
    for number, setting in enumerate(FEW):
        found = excess(setting, "close", rule, 6_000, number, layout=REDUCED)
        assert found < 1, f"{setting.name}: {found:.2f}"


def test_the_cells_may_lie_far_apart():
    truncated = Setting(temperature=1.0, cut=Cut.ALL, num_draft=2)
    apart = Layout(300, (0, 1, 40, 150, 151, 200, 256, 299))

    assert excess(truncated, "close", Rule.BLOCK, 6_000, layout=apart) < 1


def is_seen(rule, num_samples, **options):
    """With one drafter or the other."""
    regimes = ("close", "opposed")
    return any(excess(BUGGY, r, rule, num_samples, **options) > 1 for r in regimes)


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_seen(name):
    assert is_seen(Rule.BLOCK, 20_000, parts=BUGS[name])


@pytest.mark.parametrize("former", [Stream.ACCEPT, Stream.DRAFT])
def test_a_number_used_twice_is_seen(former, monkeypatch):
    """Mutant: the residual reuses a number of the stream ``former``."""

    def wrong(keys_R, positions_RK, nonces_R, stream):
        chosen = former if stream == Stream.RESIDUAL else stream
        return device_uniforms(keys_R, positions_RK, nonces_R, chosen)

    monkeypatch.setattr(verify_logits, "device_uniforms", wrong)

    assert is_seen(Rule.BLOCK, 20_000)


def test_where_nothing_is_planted_nothing_is_seen():
    assert not is_seen(Rule.BLOCK, 20_000, parts=Faces())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [SMALL, REDUCED], ids=["whole vocabulary", "reduced"])
@pytest.mark.parametrize("rule", list(Rule))
def test_the_joint_law_of_the_kernels_is_the_targets(rule, layout):
    for regime in REGIMES:
        for number, setting in enumerate(FEW):
            options = {"device": "cuda", "layout": layout}
            found = excess(setting, regime, rule, 1_000_000, number, **options)
            assert found < 1, f"{regime}, {setting.name}: {found:.2f}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_around_the_kernels_is_seen(name):
    assert is_seen(Rule.BLOCK, 1_000_000, parts=BUGS[name], device="cuda")


@pytest.mark.gpu
def test_the_kernels_keep_the_law_in_pieces_of_their_full_size():
    for number, setting in enumerate(FEW):
        assert excess(setting, "close", Rule.BLOCK, 100_000, number, device="cuda", layout=WIDE) < 1


@pytest.mark.parametrize(
    ("cut", "layout", "as_served"),
    [
        pytest.param(Cut.NOTHING, SMALL, True, id="whole"),
        pytest.param(Cut.NOTHING, SMALL, False, id="whole, and said to be"),
        pytest.param(Cut.ALL, REDUCED, True, id="truncated, reduced vocabulary"),
    ],
)
def test_kernels_decode_the_very_tokens_of_the_definitions(cut, layout, as_served):
    """Random numbers and laws are the same, so only rounding could make a difference."""

    def kernels(*arguments):
        return verify_logits_triton.verify_logits(*arguments, with_logprobs=False)

    setting = Setting(temperature=1.0, cut=cut, num_draft=2, adaptive=True)
    asked = (setting, tables_of("close"), Rule.BLOCK, 5, DEVICE, layout)
    definitions = Faces(draft_sampling.sample_draft, verify_logits.verify_logits)

    by_kernels = Faces(draft_sampling_triton.sample_draft, kernels)
    got, rate = sample(*asked, by_kernels, as_served=as_served)
    want, same = sample(*asked, definitions, as_served=as_served)

    assert got.equal(want)
    assert rate == same


@pytest.mark.parametrize("cut", [Cut.NOTHING, Cut.TOP_P])
def test_faces_are_called_as_serving_calls_them(cut):
    """One program serves all requests, so it always assumes that laws may be truncated."""
    said = []

    def verify(logits, sampling, *rest):
        said.append(sampling.truncates)
        return RIGHT.verify_logits(logits, sampling, *rest)

    setting = Setting(temperature=1.0, cut=cut, num_draft=2)
    sample(setting, tables_of("close"), Rule.BLOCK, 10, parts=Faces(verify_logits=verify))

    assert said
    assert all(said)
