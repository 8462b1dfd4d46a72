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


def drafted_batch(trace, one):
    """The text up to a round's anchor, and its draft as if that had been kept: so all its tokens
    can be compared, whatever the target said of them. Hidden states from the anchor on, which its
    draft cannot read, are NaN."""
    ids = torch.tensor([[*trace.token_ids[: one.anchor + 1], *one.draft_ids]])
    rows = restored(trace.features)[None, : one.anchor]
    unknown = rows.new_full((1, ids.shape[1] - one.anchor, *rows.shape[2:]), 1e4)
    rows = torch.cat((rows, unknown), dim=1)
    known = torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(ids.shape[1])[None]
    return from_sequences(ids, places, rows[:, :, :-1].flatten(2), rows[:, :, -1], known, known)


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

    embed = engine.programs.target.embed.weight
    compared = passes = 0
    for one in trace.rounds:
        num_draft = len(one.draft_ids)
        if num_draft:
            at, batch = torch.tensor([one.anchor]), drafted_batch(trace, one)
            with torch.no_grad():
                first, *later = ttt_outputs(module, embed, batch, at, num_draft)
                want = module.logits(torch.cat((first[one.anchor][None], *later)))
            for step in range(num_draft):
                torch.testing.assert_close(seen[passes + step], want[step], atol=1e-4, rtol=0)
            compared += num_draft
        passes += one.draft_k if num_draft else 0
    assert compared >= 60
