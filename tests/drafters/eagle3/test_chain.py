"""EAGLE-3's drafts in one launch are those of its module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.drafters import Eagle3Settings
from configs.schema import DrafterSettings
from drafters.eagle3.paged import PagedEagle3, build
from drafters.protocol import ChoosesMostLikely, DrafterContext, Weights
from serving.engine.drafts import AfterText, Best
from tests.drafters.eagle3.test_fused import (
    NUM_PAGES,
    PAGE,
    VOCAB,
    make_drafter,
    make_pass,
    make_pool,
    make_rows,
    relative_error,
)


def make_paged(draft_vocab, **options):
    """(Its module, without fused operations; in one launch), over pools with the same rows."""
    module, embed = make_drafter(draft_vocab, head_dim=32)
    drafters = [PagedEagle3(module, embed, NUM_PAGES * PAGE) for _ in range(2)]
    assert drafters[1].fuse(64, use_kernels=True, one_launch=True, **options) is None
    for drafter in drafters:
        keys, values = make_pool(module.config, torch.float32)
        drafter.keys.copy_(keys)
        drafter.values.copy_(values)
    return module, drafters


@pytest.mark.parametrize("draft_vocab", [VOCAB, 30])
@pytest.mark.parametrize("num_requests", [1, 5])
def test_greedy_drafts_are_the_same(draft_vocab, num_requests):
    module, drafters = make_paged(draft_vocab)
    _, outputs = make_rows(num_requests, 48)
    choose = Best(module.d2t)
    assert isinstance(choose, ChoosesMostLikely)

    for num_draft in (4, 1):
        want, got = (
            d.propose(outputs, make_pass(num_requests), num_draft, choose) for d in drafters
        )
        assert torch.equal(got, want) and got.shape == (num_requests, num_draft)
    assert relative_error(drafters[1].keys, drafters[0].keys) < 1e-6
    assert relative_error(drafters[1].values, drafters[0].values) < 1e-6


def test_greedy_drafts_go_on_after_known_tokens():
    module, drafters = make_paged(30)
    _, outputs = make_rows(3, 48)
    tokens = torch.tensor([[80, 2, 1, 0], [5, 6, 7, 8], [1, 2, 3, 4]])
    is_text = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    choose = Best(module.d2t, AfterText(tokens, is_text, 3))

    want, got = (d.propose(outputs, make_pass(3), 3, choose) for d in drafters)

    assert torch.equal(got, want) and torch.equal(got[is_text[:, :3]], tokens[is_text])


@pytest.mark.parametrize(("few_rows", "num_requests"), [(2, 2), (2, 3)])
def test_drawn_drafts_see_the_same_logits(few_rows, num_requests):
    """Each pass is one launch; its logits are computed with its squares or without."""
    module, drafters = make_paged(30, few_rows=few_rows)
    _, outputs = make_rows(num_requests, 48)
    found = []
    for drafter in drafters:
        seen = []

        def choose(logits, number, seen=seen):
            seen.append((number, logits))
            return module.to_target_ids(logits.topk(2).indices[:, number % 2])

        found.append((drafter.propose(outputs, make_pass(num_requests), 4, choose), seen))

    (want, want_seen), (got, seen) = found
    assert torch.equal(got, want)
    for (number, logits), (want_number, want_logits) in zip(seen, want_seen, strict=True):
        assert number == want_number and relative_error(logits, want_logits) < 1e-5


def test_new_weights_are_in_force_at_the_next_draft():
    module, drafters = make_paged(VOCAB)
    _, outputs = make_rows(4, 48)
    former = None
    for _ in range(2):
        want, got = (d.propose(outputs, make_pass(4), 4, Best(None)) for d in drafters)
        assert torch.equal(got, want) and (former is None or not torch.equal(got, former))
        former = got
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)


def test_what_it_cannot_do_is_done_as_without_it():
    """More than 32 requests; verified rows are never its own."""
    _, drafters = make_paged(VOCAB)
    at = make_pass(5)
    many = replace(at, pages_RP=at.pages_RP.repeat(7, 1)[:33], first_R=at.first_R.repeat(7)[:33])
    _, outputs = make_rows(33, 48)

    want, got = (d.propose(outputs, many, 1, Best(None)) for d in drafters)

    assert torch.equal(got, want)
    assert not drafters[1].chain.takes(outputs, many)
    assert drafters[1].chain.takes(outputs[:5], at)


@pytest.mark.parametrize("one_launch", [False, True])
def test_the_setting_decides(one_launch, caplog):
    module, embed = make_drafter(head_dim=32)
    assert DrafterSettings().eagle3.one_launch is False
    config = dict(module.config.to_json())
    context = DrafterContext(
        settings=DrafterSettings(eagle3=Eagle3Settings(one_launch=one_launch)),
        embed=embed,
        lm_head=module.lm_head,
        hidden_size=48,
        vocab_size=VOCAB,
        num_slots=NUM_PAGES * PAGE,
        logits=module.lm_head,
        device=torch.device("cpu"),
        dtype=torch.float32,
        weights=Weights(0, config, module.bundle_tensors()),
    )

    drafter = build(context)
    assert drafter.fuse(64, use_kernels=True) is None

    assert (drafter.chain is not None) is one_launch
    assert not caplog.records
    assert drafter.fuse(64) is None  # no kernels on a CPU
    assert ("one_launch has no effect: it needs a GPU" in caplog.text) is one_launch
    if one_launch:
        assert not drafter.chain.takes(make_rows(2, 48)[1], make_pass(2))
