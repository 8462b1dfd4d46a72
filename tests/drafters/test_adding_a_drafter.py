"""A new drafter takes one file and one line in the catalog; settings then select it, the engine
serves and captures it, and the policy schedules it."""

from __future__ import annotations

import json

from drafters.catalog import CATALOG, NONE
from oracles.one_line import run_in, with_addition

CONSTANT = '''
"""Proposes the token that each request committed last, over and over."""

from drafters.protocol import DrafterContext, DrafterKind, Traits

TRAITS = Traits(
    on_device=False, learns=False, needs_match=False, draws=False,
    prior_acceptance=(0.9,), prior_draft_cost=0.001,
)


class ConstantGuesser:
    kind = "constant"
    traits = TRAITS
    version = 0

    def __init__(self):
        self._last = {}

    def begin(self, key, tokens, namespace=""):
        self._last[key] = tokens[-1]

    def extend(self, keys, news):
        for key, tokens in zip(keys, news):
            if tokens:
                self._last[key] = tokens[-1]

    def observe(self, keys):
        return [0] * len(keys)

    def propose(self, keys, most):
        return [[self._last[key]] * k for key, k in zip(keys, most)]

    def finish(self, key, keep, num_tokens=None):
        del self._last[key]


def build(context: DrafterContext):
    return ConstantGuesser()


KIND = DrafterKind(TRAITS, build)
'''
LINE = '    "constant": Entry("drafters.constant:KIND"),'

SERVE = """
import json, sys
from pathlib import Path

import drafters
from buffer.backends import open_backend
from buffer.traces import TraceReader
from configs.load import load_settings
from oracles.engines import random_model, request_of, run
from oracles.support import tiny_tokenizer
from serving.build import LoadedTarget, build_service

assert Path(drafters.__file__).is_relative_to(Path.cwd()), drafters.__file__


def repeating_model():
    import torch
    model = random_model("qwen3", vocab_size=288)
    with torch.no_grad():  # the residual stream stays what the embedding put there
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


settings = load_settings((), sys.argv[1:], {})
loaded = LoadedTarget(repeating_model(), tiny_tokenizer(), "ab" * 32, "tiny")
service = build_service(settings, loaded)
service.recorder.start()
got = run(service.engine, [request_of(str(i), [40 + i, 41 + i], 40) for i in range(4)])
figures, policy = service.engine.figures(), service.engine.policy.figures()
service.recorder.close(10.0)
traces = TraceReader(open_backend(settings.buffer.url, settings.run_dir)).read(100)
print(json.dumps({
    "answers": {name: one.token_ids for name, one in got.items()},
    "arms": [list(arm) for arm in figures.steps_by_arm],
    "accepted": figures.num_accepted_tokens,
    "drafted": figures.num_draft_tokens,
    "acceptance": list(policy["acceptance"]),
    "captured": sorted({r.drafter for t in traces for r in t.rounds}),
    "traces": len(traces),
}))
"""
SETTINGS = (
    "drafter.kind=constant", "drafter.suffix.enabled=false", "device=cpu", "run_dir=run",
    "engine.max_batch=4", "engine.max_model_len=64", "drafter.max_draft=4", "policy.explore=0",
)  # fmt: skip


def house_with(line: str, tmp_path):
    return with_addition(
        tmp_path,
        "drafters/constant.py",
        CONSTANT,
        "drafters/catalog.py",
        line,
        after='    "suffix": Entry(',
    )


def test_a_drafter_is_one_file_and_one_catalog_line(tmp_path):
    """The target repeats its last token, so every draft of the guesser is accepted."""
    done = run_in(house_with(LINE, tmp_path), SERVE, *SETTINGS)

    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout)
    assert served["answers"] == {str(i): [41 + i] * 40 for i in range(4)}
    assert any(drafter == "constant" and k > 1 for drafter, k in served["arms"]), served
    assert served["accepted"] == served["drafted"] > 0, "the guesser is always right"
    assert any(name.startswith("constant/") for name in served["acceptance"])
    assert "constant" in served["captured"] and served["traces"] == 4


def test_without_its_line_the_drafter_is_unknown(tmp_path):
    done = run_in(house_with("# no line", tmp_path), SERVE, *SETTINGS)

    assert done.returncode == 1
    known = ", ".join(sorted((*CATALOG, NONE)))
    assert f"drafter.kind 'constant' is unknown; known: {known}" in done.stderr
