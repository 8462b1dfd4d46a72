"""The comparison with the authors' code, as far as it needs none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.peers.authors import Side, claims, figures_of, same_rounds, take_turns
from benchmarks.peers.authors_code import (
    Answer,
    Ids,
    _as_before,
    _indexed,
    ends_of,
)
from oracles.engines import random_model

END = frozenset({9})


class Scripted:
    """Answers every prompt alike."""

    def __init__(self, tokens: list[int], accepted: list[int]) -> None:
        self.found = Answer(tokens, accepted)
        self.asked: list[Ids] = []

    def answer(self, prompt: Ids, max_tokens: int) -> Answer:
        self.asked.append(prompt)
        return self.found


def test_an_answer_is_cut_at_its_end_and_counts_only_the_rounds_until_there() -> None:
    """One token with the prompt, then rounds of 3, 1 and 2 tokens, and one of 4 behind the end."""
    whole = Answer([1, 2, 3, 4, 5, 6, 9, 7, 7, 7, 7], [2, 0, 1, 3])

    assert whole.until(END, 100) == Answer([1, 2, 3, 4, 5, 6, 9], [2, 0, 1])
    assert whole.until(END, 5) == Answer([1, 2, 3, 4, 5], [2, 0])
    assert whole.until(frozenset(), 100) == whole
    assert whole.until(frozenset({1}), 100) == Answer([1], [])


def test_the_last_round_may_be_cut_and_all_others_must_be_equal() -> None:
    assert same_rounds(Answer([], [1, 2, 3]), Answer([], [1, 2, 0]))
    assert not same_rounds(Answer([], [1, 2, 3]), Answer([], [1, 1, 3]))
    assert not same_rounds(Answer([], [1, 2]), Answer([], [1, 2, 0]))


def test_both_sides_answer_the_same_prompts_and_differ_where_their_rounds_do() -> None:
    ours = Side(Scripted([1, 2, 3, 4, 5, 6, 9], [2, 2]))
    theirs = Side(Scripted([1, 2, 3, 4, 5, 6, 9], [2, 0, 1]))
    prompts = [(1,), (2,)]

    take_turns(ours, theirs, prompts, END, 10, 3, float("inf"), torch.device("cpu"))

    figures = figures_of(ours, theirs)
    assert ours.decoder.asked == theirs.decoder.asked == [(1,), *prompts * 3]  # type: ignore[attr-defined]
    assert (figures["tokens_per_step"], figures["their_tokens_per_step"]) == (3.0, 2.0)
    assert figures["relative_difference"] == pytest.approx(0.5)
    assert (figures["equal_texts"], figures["equal_rounds"]) == (1.0, 0.0)
    assert figures["turns"] == 3
    rows = claims({"eagle3, float32": {"draft_k": 2, **figures}})
    assert [row.holds for row in rows[:3]] == [False, None, None]
    near = claims({"eagle3, float32": {"draft_k": 2, **figures, "relative_difference": -0.019}})
    assert near[0].holds


def test_no_prompt_begins_after_the_time_is_up_but_the_first() -> None:
    ours, theirs = (Side(Scripted([1, 2, 3], [1])) for _ in range(2))

    take_turns(ours, theirs, [(1,), (2,)], END, 10, 3, 0.0, torch.device("cpu"))

    assert len(ours.answers) == len(theirs.answers) == len(ours.speeds) == 1
    assert figures_of(ours, theirs)["turns"] == 1


def test_rotary_positions_of_older_versions_are_those_of_this_one() -> None:
    config = random_model("llama").config
    with _as_before(Path()):
        pass

    theirs, scale = ROPE_INIT_FUNCTIONS["default"](config)

    assert torch.equal(theirs, LlamaRotaryEmbedding(config).inv_freq) and scale == 1.0


def test_a_target_of_one_file_gets_an_index_and_stays_as_it_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    target, scratch = tmp_path / "target", tmp_path / "links"
    target.mkdir()
    save_file({"model.embed_tokens.weight": torch.ones(3, 2)}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))

    found = _indexed(target, scratch)

    index = json.loads((found / "model.safetensors.index.json").read_text())
    assert index == {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    assert (found / "model.safetensors").exists() and (found / "config.json").exists()
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert ends_of(target) == frozenset({2})
