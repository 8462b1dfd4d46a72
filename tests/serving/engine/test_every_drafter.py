"""What holds for one drafter that learns holds for every one of the catalog: outputs are the
target's whatever it drafts, weights change in the middle, and what training simulates is served."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from statistics import fmean, stdev

import pytest
import torch

import specops.verify_logits
from drafters.acceptance import Chains
from drafters.batch import from_sequences
from drafters.catalog import CATALOG
from drafters.protocol import weights_were_overwritten
from drafters.suffix.index import REQUEST_TRAITS, SuffixIndex
from drafters.trainable import learning_kinds, trainable
from oracles.engines import make_engine, new_weights, random_model, request_of, run
from oracles.joint_law import law_excess
from policies.fixed import FixedPolicy
from specops.distill import FrozenHead
from specops.verify_logits import Rule
from targets.head import TargetHead
from tests.serving.capture.test_capture import restored, traces_of
from tests.serving.engine.test_greedy_equality import random_prompts, reference
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    SHAPES,
    V,
    law_of,
    redraw_from_target,
    reuse_the_uniform,
    soft_target,
)
from tests.serving.engine.test_sampled_law import PROMPT as LAW_PROMPT

KINDS = learning_kinds()
HOSTS = tuple(kind for kind in CATALOG if kind not in KINDS)
"""They draft from text, with certainty."""
K = 4


def scrambled(kind):
    """Overwrites the drafter's weights every third step."""

    def between(engine, step):
        if step % 3 == 0:
            torch.manual_seed(step)
            drafter = engine.drafting.neural[kind].drafter
            with torch.no_grad():
                for parameter in drafter.module.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
                weights_were_overwritten(drafter)
            drafter.version += 1

    return between


@pytest.mark.parametrize(
    ("kind", "architecture", "overlaps", "rule"),
    [
        (kind, *rest)
        for kind in KINDS
        for rest in (("qwen3", True, Rule.STANDARD), ("gemma3", False, Rule.BLOCK))
    ],
)
def test_greedy_output_is_the_targets_with_swaps_in_the_middle(kind, architecture, overlaps, rule):
    numbers = random.Random(2)
    model = random_model(architecture)
    prompts = random_prompts(numbers, 8, 96)
    expected = [reference(model, prompt, 20) for prompt in prompts]
    engine = make_engine(
        model, kind=kind, overlaps=overlaps, max_batch=4, prefill_chunk=16, page_size=4, rule=rule
    )

    got = run(engine, beside_sampled_ones(prompts), scrambled(kind))

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    assert {drafter for drafter, _ in engine.figures().steps_by_arm} > {kind, "suffix"}


def beside_sampled_ones(prompts, drafters=None):
    """Greedy requests, and others among them that are verified by the engine's rule: a batch of
    greedy ones alone does not come to it."""
    found = []
    for i, prompt in enumerate(prompts):
        found.append(request_of(str(i), prompt, 20, drafters=drafters))
        if i % 2:
            found.append(request_of(f"sampled {i}", prompt, 20, temperature=1.0, drafters=drafters))
    return found


@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
@pytest.mark.parametrize("kind", HOSTS)
def test_greedy_output_is_the_targets_where_only_text_drafts(kind, rule):
    numbers = random.Random(4)
    model = random_model("qwen3")
    prompts = [[*stem, *stem] for stem in random_prompts(numbers, 6, 96)]
    expected = [reference(model, prompt, 20) for prompt in prompts]
    engine = make_engine(model, **only(kind), max_batch=4, prefill_chunk=16, page_size=4, rule=rule)
    engine.drafting.hosts[kind].__class__ = Stubborn

    got = run(engine, beside_sampled_ones(prompts, asked(kind)))

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    assert engine.figures().num_draft_tokens > 100


class Stubborn(SuffixIndex):
    """Proposes the same tokens whatever the text is: often wrong ones, and all alike, so that what
    is wrong with their verification does not cancel out."""

    def propose(self, keys, most):
        return [[(2 + j) % V for j in range(k)] for k in most]


def only(kind):
    """Of ``make_engine``: drafts of this kind in every round, and of no other."""
    index = SuffixIndex(2, 8, 0, "suffix_request", REQUEST_TRAITS)
    policy = FixedPolicy(kind, 3)
    if kind in KINDS:
        return {"kind": kind, "suffix": False, "policy": policy}
    is_own = kind == index.kind
    return {"suffix": not is_own, "on_request": (index,) if is_own else (), "policy": policy}


def asked(kind):
    """The drafters that a request has to name."""
    return ("suffix_request",) if kind == "suffix_request" else None


CELLS = {
    Rule.BLOCK: (("whole", False), ("truncated", False), ("whole", True)),
    Rule.STANDARD: (("truncated", False), ("whole", False), ("truncated", True)),
}
"""Sampling of the requests that one engine answers together, and whether they have a seed; those
with one are verified by ``Rule.MATCH``."""


def excesses(kind, rule, num_samples=700):
    """Of each cell, the excess of its joint law; every request with a seed has another one."""
    cells = CELLS[rule]
    engine = make_engine(
        soft_target("opposed"), **only(kind), rule=rule, overlaps=rule == Rule.BLOCK,
        max_batch=256, num_pages=1200, prefill_chunk=1024, ring_rows=8192, max_draft=3,
    )  # fmt: skip
    if kind in HOSTS:
        engine.drafting.hosts[kind].__class__ = Stubborn
    requests = [
        request_of(
            f"{cell} {i}", LAW_PROMPT, LENGTH + 1, capture=False, drafters=asked(kind),
            seed=i if is_seeded else None, **SHAPES[shape],
        )
        for i in range(num_samples)
        for cell, (shape, is_seeded) in enumerate(cells)
    ]  # fmt: skip

    got = run(engine, requests)

    counts = torch.zeros(len(cells), V, V, V, dtype=torch.float64)
    for name, collected in got.items():
        counts[(int(name.partition(" ")[0]), *collected.token_ids[:LENGTH])] += 1
    figures = engine.figures()
    assert {drafter for drafter, _ in figures.steps_by_arm} - {"none"} == {kind}
    assert 200 < figures.num_accepted_tokens < figures.num_draft_tokens / 2
    laws = [law_of("opposed", shape) for shape, _ in cells]
    return [law_excess(of_cell, law) for of_cell, law in zip(counts, laws, strict=True)]


@pytest.mark.parametrize("rule", CELLS)
@pytest.mark.parametrize("kind", [*KINDS, *HOSTS])
def test_the_joint_law_is_the_targets(kind, rule):
    """Every drafter, every rule, and two temperatures, one of them with truncation."""
    assert max(excesses(kind, rule)) < 1


@pytest.mark.parametrize(
    ("kind", "rule", "mutant"),
    [
        ("dflash", Rule.BLOCK, redraw_from_target),
        ("p_eagle", Rule.STANDARD, reuse_the_uniform),
        ("suffix", Rule.BLOCK, redraw_from_target),
    ],
)
def test_a_planted_bug_is_seen_with_this_few_samples(monkeypatch, kind, rule, mutant):
    monkeypatch.setattr(specops.verify_logits, f"verify_{rule.name.lower()}", mutant)

    *sampled, seeded = excesses(kind, rule)

    assert max(sampled) > 1
    assert seeded < 1, "no number of that rule decides it"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_output_is_that_of_plain_decoding_with_swaps_in_the_middle(kind, shape):
    numbers = random.Random(3)
    prompts = random_prompts(numbers, 6, V)
    requests = [request_of(str(i), p, 24, seed=i, **SHAPES[shape]) for i, p in enumerate(prompts)]
    sizes = {"kind": kind, "max_batch": 4, "prefill_chunk": 16, "overlaps": shape == "whole"}
    plain = make_engine(soft_target("opposed"), max_draft=0, **sizes)
    engine = make_engine(soft_target("opposed"), **sizes)

    expected, got = run(plain, requests), run(engine, requests, scrambled(kind))

    assert plain.figures().num_draft_tokens == 0
    assert engine.figures().num_accepted_tokens > 5, "every round brought one token, as plain ones"
    assert {name: one.token_ids for name, one in got.items()} == {
        name: one.token_ids for name, one in expected.items()
    }
    assert {drafter for drafter, _ in engine.figures().steps_by_arm} > {kind, "suffix"}


def trained_on(trace, temperature=0.0):
    """The batch of a whole trace, every row with a loss."""
    rows = restored(trace.features)[None]
    ids = torch.from_numpy(trace.token_ids).long()[None]
    known = torch.zeros_like(ids, dtype=torch.bool)
    known[0, trace.features.positions] = True
    padded = torch.cat((rows, rows[:, -1:]), dim=1)
    loss = known.clone()
    loss[:, -1] = False  # nothing follows it
    batch = from_sequences(
        ids,
        torch.arange(ids.shape[1])[None],
        padded[:, :, :-1].flatten(2),
        padded[:, :, -1],
        known,
        loss,
        torch.full((1,), temperature),
    )
    by_match = torch.full_like(batch.by_match_R, trace.sampling.is_decided)
    return replace(batch, by_match_R=by_match)


def head_of(model):
    """As a trainer loads it: an embedding table that the target scales is scaled."""
    embed = model.get_input_embeddings()
    scaled = embed.weight * getattr(embed, "scalar_embed_scale", 1.0)
    return TargetHead(model.config, scaled, FrozenHead(model.lm_head.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_simulates_is_what_was_accepted(monkeypatch, kind):
    """For greedy requests the simulated acceptance of a chain is 0 or 1, and exactly as served. The
    target has few tokens, so that random drafters are right now and then, at any place of a
    draft."""
    model = random_model("llama", vocab_size=V)
    weights = new_weights(kind, model)
    engine = make_engine(
        model, kind=kind, weights=weights, policy=FixedPolicy(kind, K), suffix=False,
        prefill_chunk=7, max_batch=8, prefix_cache=False,
    )  # fmt: skip
    drafter = engine.drafting.neural[kind].drafter
    observe = drafter.observe  # the log holds bfloat16: serving shall read the same numbers
    monkeypatch.setattr(
        drafter, "observe", lambda ids, rows, at: observe(ids, rows.bfloat16().float(), at)
    )
    prompts = random_prompts(random.Random(6), 10, V)
    traces = traces_of(engine, [request_of(str(i), p, 40) for i, p in enumerate(prompts)])[0]
    head, learns = head_of(model), trainable(kind)
    compared = Counter()
    for trace in traces.values():
        batch = trained_on(trace)
        module = learns.load_model(weights.config, weights.tensors)
        _, alphas, is_full = learns.acceptance(module, head, batch, K)
        row_of = {int(p): r for r, p in enumerate(batch.row_R)}
        for one in trace.rounds:
            row = row_of.get(one.anchor)
            if row is None or not is_full[row] or len(one.draft_ids) < K:
                continue
            assert int(alphas[row].cumprod(0).sum()) == one.num_accepted, one.anchor
            compared[one.num_accepted] += 1
    kept = compared.total() - compared[0]
    assert compared.total() >= 80 and kept >= 5 and len(compared) > 1, compared


WAYS = {
    "seeded": Rule.MATCH,
    "standard": Rule.STANDARD,
    "block": Rule.BLOCK,
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [*product(KINDS, WAYS)],
)
def test_simulated_tokens_per_step_is_that_of_live_rounds(kind, way):
    """At a temperature, over whole answers that end where the target ends them: what the texts say
    of rounds is what rounds brought, up to what chance does in so many of them. With a seed nothing
    is left to chance."""
    model = soft_target("close")
    weights = new_weights(kind, model)
    seeded, rule = way == "seeded", WAYS[way]
    engine = make_engine(
        model, kind=kind, weights=weights, policy=FixedPolicy(kind, K), suffix=False,
        max_batch=128, num_pages=2000, prefill_chunk=1024, ring_rows=16_384,
        rule=Rule.BLOCK if seeded else rule, eos_ids=frozenset({5}),
    )  # fmt: skip
    prompts = [[i % V, i // V % V, i // V // V] for i in range(200)]
    requests = [
        request_of(str(i), ids, 40, temperature=1.0, seed=i if seeded else None)
        for i, ids in enumerate(prompts)
    ]

    traces = traces_of(engine, requests)[0]

    head, learns = head_of(model), trainable(kind)
    module = learns.load_model(weights.config, weights.tensors)
    texts, is_full, brought = [], [], []
    for trace in traces.values():
        if len(trace.rounds) == 0:
            continue
        batch = trained_on(trace, 1.0)
        _, alphas, full = learns.acceptance(module, head, batch, K, block=rule is Rule.BLOCK)
        answer = batch.row_R >= trace.prompt_length  # rounds begin behind the first token
        texts.append(alphas[answer])
        is_full.append(full[answer])
        anchors = [one.anchor for one in trace.rounds]
        assert int(answer.sum()) == trace.token_ids.size - 1 - anchors[0]
        brought += [b - a for a, b in pairwise([*anchors, trace.token_ids.size - 1])]
    live, error = fmean(brought), stdev(brought) / len(brought) ** 0.5
    chains = Chains.join(Chains.of_texts(texts, is_full), K)
    assert live > 1.05 and error < 0.03 * live
    assert 4 < fmean(map(len, texts)) < 15  # ends weigh
    within = 0.005 * live if seeded else 3 * error
    assert chains.tokens_per_step() == pytest.approx(live, abs=within)
