"""One module serves and trains: on the same logged rows both forwards give the same draft logits.

This is the test that catches what breaks drafters in the field: a feature off by one row or layer,
a context that includes the anchor, other positions in training than in serving.
"""

from __future__ import annotations

import pytest
import torch

from drafters.batch import from_sequences
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.training import ttt_outputs
from oracles.engines import make_engine, random_model, request_of
from policies.fixed import FixedPolicy
from tests.serving.capture.test_capture import PROMPT, restored, traces_of

K = 4


def served_logits(engine, monkeypatch):
    """Collect the drafter's logits of every draft pass, in order."""
    seen = []
    module = engine.drafting.neural["eagle3"].drafter.module
    module.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out[0].clone()))
    # The log holds bfloat16: let serving read the very numbers that training will.
    neural = engine.drafting.neural["eagle3"].drafter
    observe = neural.observe
    monkeypatch.setattr(
        neural, "observe", lambda ids, rows, at: observe(ids, rows.bfloat16().float(), at)
    )
    return seen


@pytest.mark.parametrize("overlaps", [False, True], ids=["waits", "overlaps"])
@pytest.mark.parametrize(
    ("architecture", "variants"),
    [
        ("qwen3", ()),
        ("llama", ()),
        ("qwen3", ("norm_before_residual",)),
        ("llama", ("fc_norm", "norm_output")),
    ],
)
def test_draft_logits_of_serving_and_training_are_equal(
    monkeypatch, architecture, variants, overlaps
):
    model = random_model(architecture)
    config = config_for_target(model.config).to_json() | dict.fromkeys(variants, True)
    drafter = Eagle3(Eagle3Config.from_json(config))
    drafter.initialise(1, model.get_output_embeddings().weight)
    engine = make_engine(
        model, drafter=drafter, policy=FixedPolicy("eagle3", K), suffix=False,
        prefill_chunk=7, overlaps=overlaps,
    )  # fmt: skip
    seen = served_logits(engine, monkeypatch)
    trace = traces_of(engine, [request_of("a", PROMPT, 40)])[0]["a"]
    module = engine.drafting.neural["eagle3"].drafter.module

    rows = restored(trace.features)[None]
    ids = torch.from_numpy(trace.token_ids).long()[None]
    known = torch.zeros_like(ids, dtype=torch.bool)
    known[0, trace.features.positions] = True
    padded = torch.cat((rows, rows[:, -1:]), dim=1)
    batch = from_sequences(
        ids,
        torch.arange(ids.shape[1])[None],
        padded[:, :, :-1].flatten(2),
        padded[:, :, -1],
        known,
        known,
    )
    anchors = torch.arange(1, ids.shape[1])
    with torch.no_grad():
        outputs = list(ttt_outputs(module, engine.programs.target.embed.weight, batch, anchors, K))
    outputs[0] = outputs[0][1:]

    compared = passes = 0
    for one in trace.rounds:
        for step in range(len(one.draft_ids)):
            if step <= one.num_accepted:  # its context is what was committed
                want = module.logits(outputs[step][one.anchor - 1])
                torch.testing.assert_close(seen[passes + step], want, atol=1e-4, rtol=0)
                compared += 1
        passes += one.draft_k if one.draft_ids else 0
    assert compared >= 15
