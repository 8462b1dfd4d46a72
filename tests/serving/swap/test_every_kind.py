"""Versions of every kind of drafter that learns: taken between two steps, rolled back by order, and
by themselves when they accept less; outputs never change."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from buffer.fingerprint import target_fingerprint
from buffer.folder_weights import FolderWeights
from configs.schema import Settings
from drafters.initial import TargetFacts, made_drafter, new_drafter, publish_initial
from drafters.several import settings_of
from drafters.trainable import learning_kinds
from oracles.engines import Collected, request_of
from serving.border.in_process import Desk
from serving.build import build_service
from tests.serving.swap.test_swaps import ask, noisy, publish_next, wait_until

PROMPT = [247, 247]
"""After it the tiny target repeats one token."""
CLIENTS = 8
"""Requests at once, so that the rounds that a watch wants are few steps."""
UNDECIDED = {"temperature": 0.002}
HOW = {}, {"temperature": 0.002, "seed": 1}, UNDECIDED, {}
"""Sampling of the clients in turn, so that the rounds that are watched are verified by every rule.
The target's logits lie close: hotter, it would not repeat itself. Without a seed answers may
differ; their law is that of ``engine/test_every_drafter``."""


def settings_for(target, run_dir, kind, rule, main):
    whole = {"draft_model": {"target_layers": 4}} if kind == "draft_model" else {}
    taps = {"layer_ids": (4,)} if kind in ("eagle3", "p_eagle") else {}
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {
                "max_batch": CLIENTS, "max_model_len": 160, "page_size": 4, "verification": rule,
            },
            "drafter": {
                "kind": main or kind, "max_draft": 3, "suffix": {"enabled": False}, **whole,
                **(taps if main is None else {"mixed": False, "beside": [{"kind": kind} | taps]}),
            },
            "policy": {"kind": "fixed", "drafter": kind, "draft_k": 3},
            "swap": {"poll_s": 0.02, "watch_rounds": 96},
        }
    )  # fmt: skip


@torch.no_grad()
def made_right(kind, config, tensors, model):
    """The drafter's tensors so that it says what the target says where that repeats itself: layers
    that add nothing, behind them the last hidden state, or the one that the target ends in."""
    if kind == "draft_model":
        return tensors  # the whole target
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    tensors["norm.weight"].copy_(model.model.norm.weight)
    hidden = len(tensors["norm.weight"])
    if "lm_head.weight" in tensors:
        tensors["fc.weight"].copy_(torch.eye(hidden))
        tensors["lm_head.weight"].copy_(model.lm_head.weight)
    elif "proj.weight" in tensors:
        tensors["proj.weight"].copy_(torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), 1))
        for name in ("hidden_norm", "norm"):
            tensors[f"{name}.weight"].fill_(1.0)
    else:
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)
        end = model.model(ids).last_hidden_state[0, -1]
        mask = model.get_input_embeddings().weight[config["mask_token_id"]]
        tensors["norm.weight"].copy_(end / (mask / mask.pow(2).mean().sqrt()))
    return tensors


def negated(tensors):
    name = next((n for n in tensors if n.endswith("lm_head.weight")), "norm.weight")
    return {**tensors, name: -tensors[name]}


def ask_all(service):
    """One answer for each client, all at once."""
    answers, done = [Collected() for _ in range(CLIENTS)], threading.Semaphore(0)

    def take(collected, output):
        collected.take(output)
        if output.finish_reason:
            done.release()

    for number, one in enumerate(answers):
        how = HOW[number % len(HOW)]
        request = request_of(f"{id(answers)}-{number}", PROMPT, 140, ignore_eos=True, **how)
        service.inbox.submit(request, lambda output, one=one: take(one, output))
    for _ in answers:
        assert done.acquire(timeout=60)
    return answers


@pytest.mark.parametrize(
    ("kind", "rule", "main"),
    [
        *((kind, rule, None) for kind in learning_kinds() for rule in ("block", "standard")),
        ("dflash", "block", "eagle3"),
    ],
)
def test_versions_are_taken_and_rolled_back_and_no_output_changes(
    tiny_target_dir, tmp_path, kind, rule, main
):
    """Of the drafter of a server, and of one beside another, whose versions stay."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target_dir, dtype=torch.float32)
    settings = settings_for(tiny_target_dir, tmp_path, kind, rule, main)
    facts = TargetFacts(
        model.config, model.lm_head.weight.detach(), target_fingerprint(tiny_target_dir)
    )
    manifest, content = made_drafter(kind, facts, new_drafter(settings_of(settings, kind)))
    right = made_right(kind, manifest.drafter_config, load(content), model)
    root = tmp_path / "weights" / (kind if main else "")
    publish_initial(FolderWeights(root), manifest, save(right))
    service = build_service(settings)
    desk = Desk(service)

    def status_of():
        status = service.drafter_status()
        return status["beside"][0] if main else status

    service.start()
    try:
        first = ask(service, "first")
        assert publish_next(root, noisy) == 1
        wait_until(lambda: status_of()["version"] == 1)
        second = ask(service, "second")
        assert desk.rollback(kind)["version"] == 0
        found = ask_all(service)
        figures = service.figures()
        assert figures.num_accepted_tokens > 0.3 * figures.num_draft_tokens

        publish_next(root, negated)
        wait_until(lambda: status_of()["version"] == 2)
        for _ in range(20):
            found += ask_all(service)
            if service.figures().swaps["rolled_back"] == 2:
                break
        status = status_of()
        last = ask(service, "last")
    finally:
        service.stop()

    assert (status["version"], status["denied"]) == (0, [1, 2]), status["history"]
    if main:
        assert service.drafter_status()["version"] == 0 and not service.drafter_status()["denied"]
    versions = [one.last.stats.drafter_version for one in (first, second, last)]
    assert versions == [0, 1, 0]
    assert second.last.stats.proposed > 0
    assert first.token_ids == second.token_ids == last.token_ids
    for number in range(CLIENTS):
        same = {tuple(one.token_ids) for one in found[number::CLIENTS]}
        assert len(same) == 1 or HOW[number % len(HOW)] is UNDECIDED, number
