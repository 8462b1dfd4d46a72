"""The target's weights change between two steps while requests decode: every token follows one set
of weights, given the whole text before it, whatever is drafted."""

from __future__ import annotations

import random

import pytest
import torch

from drafters.mtp import PagedMtp
from oracles.engines import make_engine, random_model, request_of, run
from oracles.plain_reference import adjusted, chosen
from serving.engine.loop import Listeners
from targets.update import TargetWeights
from tests.serving.engine.test_mtp import head_for

V = 96


class Updates:
    """Orders an update before each of some steps, alternating between two checkpoints."""

    def __init__(self, steps, folders):
        self.steps, self.folders = steps, folders
        self.weights = None
        self.step = self.num_made = 0
        self.restarted = []

    def between(self, engine, step):
        self.weights = self.weights or TargetWeights(engine.programs.target)
        self.step = step

    def change_target(self, change):
        if self.step not in self.steps[self.num_made : self.num_made + 1]:
            return
        self.weights.read(self.folders[self.num_made % 2])
        self.num_made += 1
        self.restarted.append(change(self.weights.take_over))


@torch.no_grad()
def by_the_book(models, request, switches, last_version):
    """The answer, decoded by one full pass for each token; models take turns at ``switches``."""
    p, tokens = request.sampling, list(request.prompt_ids)
    first = last_version - len(switches)
    for number in range(p.max_tokens):
        version = first + sum(at <= number for at in switches)
        logits = models[version % 2](torch.tensor([tokens])).logits[0, -1].double()
        wanted = adjusted(
            logits.tolist(), request.prompt_ids, tokens[len(request.prompt_ids) :],
            p.presence_penalty, p.frequency_penalty, p.repetition_penalty, dict(p.logit_bias),
        )  # fmt: skip
        tokens.append(chosen(torch.tensor(wanted, dtype=torch.float64), request, len(tokens)))
    return tokens[len(request.prompt_ids) :]


def requests_of(numbers):
    """Some share a prefix longer than a chunk, some are sampled with a seed or have penalties."""
    stem = [numbers.randrange(V) for _ in range(30)]
    shapes = (
        {}, {}, {"temperature": 0.8, "seed": 7}, {"frequency_penalty": 1.0}, {"logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5}, {}, {"max_draft": 0},
    )  # fmt: skip
    return [
        request_of(
            str(number),
            stem[: numbers.choice((0, 20, 30))] + [numbers.randrange(V) for _ in range(3)],
            numbers.randint(8, 18),
            ignore_eos=True,
            **shape,
        )
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        ("eagle3", "qwen3", {"fused": True}),
        ("eagle3", "gemma3", {"fused": True, "overlaps": False}),
        ("mtp", "llama", {}),
        ("draft_model", "qwen3", {"overlaps": False}),
        ("dflash", "qwen3", {"fused": True}),
    ],
)
def test_every_token_follows_the_weights_that_were_in_force(kind, architecture, options, tmp_path):
    models = [random_model(architecture, seed=seed, head_dim=16) for seed in (0, 1)]
    running = random_model(architecture, seed=0, head_dim=16)
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    updates = Updates([7, 16], [tmp_path / "1", tmp_path / "0"])
    listeners = Listeners(change_target=updates.change_target)
    drafter = {"drafter": head_for(running, 40)} if kind == "mtp" else {"kind": kind}
    engine = make_engine(
        running, max_batch=4, prefill_chunk=16, page_size=4, listeners=listeners,
        **drafter, **options,
    )  # fmt: skip
    requests = requests_of(random.Random(3))

    got = run(engine, requests, updates.between)

    assert updates.num_made == 2
    switched = 0
    for request in requests:
        one = got[request.id]
        stats = one.last.stats
        switched += len(stats.target_switches)
        assert all(0 < at < request.sampling.max_tokens for at in stats.target_switches)
        assert one.token_ids == by_the_book(
            models, request, stats.target_switches, stats.target_version
        ), request.id
        if request.sampling.logprobs is not None:
            assert [entry.token_id for entry in one.logprobs] == one.token_ids
    assert switched > 4
    assert sum(one.num_requests for one in updates.restarted) >= switched
    figures = engine.figures()
    assert figures.num_draft_tokens > 0
    assert figures.kv_usage == 0


def test_a_prefix_that_former_weights_computed_is_found_by_nobody(tmp_path):
    models = [random_model("qwen3", seed=seed) for seed in (0, 1)]
    models[1].save_pretrained(tmp_path)
    updates = Updates([0], [tmp_path])
    running = random_model("qwen3", seed=0)
    engine = make_engine(running, listeners=Listeners(change_target=updates.change_target))
    prompt = [n * 5 % V for n in range(33)]

    def ask(name):
        return run(engine, [request_of(name, prompt, 5)], updates.between)[
            name
        ].last.num_cached_tokens

    updates.num_made = 1  # no update yet
    assert [ask("a"), ask("b")] == [0, 32]
    updates.num_made = 0
    assert [ask("c"), ask("d")] == [0, 32]
    assert updates.num_made == 1


def test_a_drafter_with_a_reduced_vocabulary_drafts_with_the_new_lm_head(tmp_path):
    model, new = (random_model("qwen3", seed=seed) for seed in (0, 1))
    new.save_pretrained(tmp_path)
    updates = Updates([0], [tmp_path])
    listeners = Listeners(change_target=updates.change_target)
    engine = make_engine(model, drafter=head_for(model, 40), listeners=listeners)
    drafter = engine.drafting.neural["mtp"].drafter
    assert isinstance(drafter, PagedMtp)

    run(engine, [request_of("a", [1, 2, 3], 4)], updates.between)

    outputs = torch.randn(3, 48)
    wanted = outputs @ new.lm_head.weight[torch.arange(0, 80, 2)].T
    torch.testing.assert_close(drafter._logits(outputs, None), wanted)


def test_only_requests_that_had_tokens_leave_no_trace(tmp_path):
    model = random_model("qwen3", seed=0)
    random_model("qwen3", seed=1).save_pretrained(tmp_path)
    finished = []
    updates = Updates([4], [tmp_path])
    listeners = Listeners(change_target=updates.change_target, on_finished=finished.append)
    engine = make_engine(model, max_batch=2, prefill_chunk=8, page_size=4, listeners=listeners)
    requests = [
        request_of("decodes", [1, 2, 3], 30),
        request_of("is in its prompt", [n % V for n in range(60)], 4),
        request_of("private", [5], 12, capture=False),
        request_of("waits", [7, 8], 4),
    ]

    run(engine, requests, updates.between)

    left = {s.request.id: s for s in finished}
    assert left.keys() == {"is in its prompt", "waits"}
    assert updates.restarted[0].num_requests == 2
    assert updates.restarted[0].num_untraced == 1
    pieces = left["is in its prompt"].capture_rows
    assert pieces[0] == 0 and sum(pieces[2::3]) >= 60  # from its first row on, by one target
