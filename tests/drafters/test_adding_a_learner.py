"""A new drafter that computes on the device and learns takes one file and one line: a server
drafts with it and captures, a trainer trains it from the traces, and the server swaps what is
published in."""

from __future__ import annotations

import json

from oracles.one_line import run_in, with_addition

BIGRAM = '''
"""Drafts each token from the one before it alone: a table of inputs of the target's lm_head."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import nn

from drafters.eagle3.chains import lay_out
from drafters.kept import acceptance_of_text, heat_of
from drafters.objectives import objective_loss, objective_of, shares
from drafters.protocol import DrafterKind, Traits
from drafters.stored_module import StoredModule, check_shape, first_weights, for_serving
from drafters.trainable import BatchLoss
from specops.device import distill
from specops.distill import RowFigures, Rows, Teacher

TRAITS = Traits(on_device=True, learns=True, needs_match=False, draws=True)


@dataclass(frozen=True)
class BigramConfig:
    hidden_size: int
    target_vocab_size: int
    layer_ids: tuple = ()

    def to_json(self):
        return {**asdict(self), "layer_ids": list(self.layer_ids)}

    @classmethod
    def from_json(cls, value):
        return cls(**{**value, "layer_ids": tuple(value["layer_ids"])})


class Bigram(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.target_vocab_size, config.hidden_size)

    def forward(self, ids):
        return self.table(ids)


class PagedBigram:
    kind, traits, first_row, layer_ids, vocab = "bigram", TRAITS, 0, (), None

    def __init__(self, module, logits, version):
        self.module, self.logits, self.version = module, logits, version
        self.output_size = module.config.hidden_size

    def fuse(self, num_positions):
        return "it is one lookup"

    def observe(self, ids_T, features_TmH, at):
        return self.module(ids_T)

    def propose(self, outputs_RH, at, num_draft, choose):
        drafted = []
        for number in range(num_draft):
            drafted.append(choose(self.logits(outputs_RH), number))
            outputs_RH = self.module(drafted[-1])
        return torch.stack(drafted, dim=1)


def build(context):
    weights = first_weights(context)
    config = BigramConfig.from_json(weights.config)
    check_shape(context, config.hidden_size, config.target_vocab_size)
    module = for_serving(lambda: Bigram(config), context)
    return PagedBigram(module, context.logits, weights.version)


KIND = DrafterKind(TRAITS, build)


class BigramTrainable(StoredModule):
    config_class: ClassVar = BigramConfig
    module_class: ClassVar = Bigram
    kind = "bigram"

    def new_model(self, target_config, lm_head_VH, layer_ids, seed, *options):
        size, hidden = lm_head_VH.shape
        model = Bigram(BigramConfig(hidden, size))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, hidden, generator=generator)
        model.load_state_dict({"table.weight": drawn * 0.02})
        return model

    def matrices(self, model):
        return []

    def loss(self, model, head, batch, settings, generator):
        alive_KR = lay_out(batch, settings.ttt_steps, 1.0, None).alive_KR
        objective = objective_of(settings)
        weights = shares(objective, alive_KR.sum(dim=0).float(), batch.weight_R)
        found = objective_loss(objective, *self._given(model, head, batch, None), weights)
        of_chains = [self._ahead(column.detach(), alive_KR) for column in found.figures]
        figures, num_K = RowFigures(*of_chains), alive_KR.sum(dim=1).clamp_min(1)
        alpha_K = (figures.alpha_N * alive_KR).sum(dim=1) / num_K
        return BatchLoss(found.loss, alpha_K, (figures.agrees_N & alive_KR).sum(dim=1) / num_K)

    @torch.no_grad()
    def acceptance(self, model, head, batch, num_draft, *, block=False):
        alive_KR = lay_out(batch, num_draft, 1.0, None).alive_KR
        nothing_R = torch.zeros(len(batch.row_R), device=batch.row_R.device)
        given = self._given(model, head, batch, heat_of(batch))
        figures = distill(*given, nothing_R, "lk").figures
        drafted = RowFigures(*(self._ahead(column, alive_KR) for column in figures))
        return acceptance_of_text(batch, head.lm_head, drafted, alive_KR, block=block)

    def _given(self, model, head, batch, heat_R):
        hidden_RH = model(batch.token_ids_T[batch.row_R])
        if heat_R is not None:
            hidden_RH = hidden_RH / heat_R[:, None]
        last = batch.token_ids_T.numel() - 1
        label_R = batch.token_ids_T[(batch.row_R + 1).clamp_max(last)]
        teacher = Teacher(batch.last_hidden_RH, head.lm_head, None, heat_R)
        dtype = batch.last_hidden_RH.dtype
        weight_VH = head.lm_head.weight_VH.to(dtype)
        return hidden_RH.to(dtype), weight_VH, teacher, Rows(label_R, batch.is_row_R)

    def _ahead(self, values_R, alive_KR):
        own_R = torch.arange(len(values_R), device=values_R.device)
        last = len(values_R) - 1
        return torch.stack([values_R[(own_R + k).clamp_max(last)] for k in range(len(alive_KR))])
'''
LINE = '    "bigram": Entry("drafters.bigram:KIND", "drafters.bigram:BigramTrainable"),'

LIVE = """
import json, sys, threading, time
from pathlib import Path

import torch

import drafters
from configs.load import load_settings
from oracles.engines import Collected, random_model, request_of
from oracles.support import tiny_tokenizer
from serving.build import build_service
from trainer.build import build_trainer
from trainer.loop import run

assert Path(drafters.__file__).is_relative_to(Path.cwd()), drafters.__file__
settings = load_settings((), sys.argv[1:], {})
model = random_model("qwen3", vocab_size=288)
with torch.no_grad():  # the target repeats its last token
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
model.save_pretrained("target")
tiny_tokenizer().save_pretrained("target")
service = build_service(settings)
service.start()


def answers(name):
    found, done = [Collected() for _ in range(24)], threading.Semaphore(0)

    def take(one, output):
        one.take(output)
        if output.finish_reason:
            done.release()

    before = service.figures()
    for i, one in enumerate(found):
        request = request_of(f"{name}-{i}", [40 + i % 4, 41 + i % 4], 40)
        service.inbox.submit(request, lambda output, one=one: take(one, output))
    for _ in found:
        assert done.acquire(timeout=60)
    after = service.figures()
    drafted = after.num_draft_tokens - before.num_draft_tokens
    return {
        "texts": [one.token_ids for one in found],
        "drafted": drafted,
        "kept": (after.num_accepted_tokens - before.num_accepted_tokens) / drafted,
        "versions": sorted({one.last.stats.drafter_version for one in found}),
    }


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, (service.recorder.counts(), service.drafter_status())
        time.sleep(0.01)


try:
    first = answers("first")
    wait_until(lambda: service.recorder.counts()["written"] == 24)
    run(build_trainer(settings, threading.Event()))
    wait_until(lambda: service.drafter_status()["version"] > 0)
    second = answers("second")
finally:
    service.stop()
print(json.dumps({"first": first, "second": second}))
"""
SETTINGS = (
    "target=target", "drafter.kind=bigram", "drafter.suffix.enabled=false", "device=cpu",
    "run_dir=run", "engine.max_batch=24", "engine.max_model_len=64", "drafter.max_draft=3",
    "policy.kind=fixed", "policy.drafter=bigram", "policy.draft_k=3", "swap.poll_s=0.02",
    "trainer.device=cpu", "trainer.nice=0", "trainer.lr=0.03", "trainer.batch_tokens=256",
    "trainer.max_sequence=64", "trainer.min_traces=4", "trainer.publish_every_steps=10",
    "trainer.warmup_steps=2", "trainer.held_out_every=2", "trainer.max_steps=20",
    "trainer.gate_confidence=0.5", "trainer.replay_ratio=32", "trainer.cool_down_s=0",
)  # fmt: skip


def test_a_drafter_that_learns_is_one_file_and_one_catalog_line(tmp_path):
    house = with_addition(
        tmp_path, "drafters/bigram.py", BIGRAM, "drafters/catalog.py", LINE,
        after='    "suffix": Entry(',
    )  # fmt: skip

    done = run_in(house, LIVE, *SETTINGS)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = found["first"], found["second"]
    assert first["texts"] == second["texts"] == [[41 + i % 4] * 40 for i in range(24)]
    assert first["versions"] == [0] and second["versions"] == [max(second["versions"])] != [0]
    assert first["kept"] < 0.5 and second["kept"] > 0.9, found
    assert first["drafted"] > second["drafted"] > 100
