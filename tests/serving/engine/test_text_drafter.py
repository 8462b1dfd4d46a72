"""The suffix index on the device: outputs are the target's, lanes hold the text of their requests,
and drafts follow it and that of finished requests, launched before the last round is read."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from drafters.suffix.on_device import DeviceIndex, FinishedTexts
from drafters.suffix.traits import DEVICE_REQUEST_TRAITS, DEVICE_TRAITS
from oracles.engines import (
    RandomPolicy,
    make_engine,
    new_weights,
    random_model,
    request_of,
    run,
)
from oracles.joint_law import chi_squared_excess
from policies.fixed import FixedPolicy
from policies.interface import Decision, Pick
from serving.capture.rounds import round_columns
from serving.engine import text_mix
from serving.engine.deciding import PLAIN
from serving.engine.loop import Listeners
from specops.matches import BLOCK, END, Bounds, TextDrafts
from specops.text_first import NEURAL_ALONE, TEXT, TEXT_ALONE, TEXT_FIRST, Begun
from specops.verify_logits import Rule
from tests.serving.engine.test_answers_on_devices import DEVICES, engine_on
from tests.serving.engine.test_every_drafter import scrambled
from tests.serving.engine.test_greedy_equality import random_prompts, reference
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    SHAPES,
    V,
    counted,
    expected_law,
    soft_target,
)
from tests.serving.engine.test_sampled_law import PROMPT as LAW_PROMPT

CPU = torch.device("cpu")
MIX = "eagle3+suffix"
SUFFIX = FixedPolicy("suffix", 3, needs_match=False)


def index_of(device=CPU):
    return DeviceIndex("suffix", DEVICE_TRAITS, Bounds(2, 8), 4 * BLOCK, torch.device(device))


def request_index():
    return DeviceIndex("suffix_request", DEVICE_REQUEST_TRAITS, Bounds(2, 8), 0, CPU)


def assert_texts_are_kept(engine, _step=0):
    """Lanes hold what the host knows of their requests."""
    texts = engine.programs.lanes.state.texts_LN
    for sequence in engine.scheduler.running:
        if sequence.is_prefilled:
            assert texts[sequence.lane, : len(sequence.tokens)].tolist() == sequence.tokens


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("overlaps", [True, False])
def test_greedy_output_is_the_targets_and_lanes_hold_their_text(architecture, overlaps):
    numbers = random.Random(3)
    model = random_model(architecture)
    prompts = random_prompts(numbers, 9, 96)
    prompts += [prompts[0], [*prompts[1][:24], *prompts[2][:9]]]  # from the prefix cache
    expected = [reference(model, prompt, 20) for prompt in prompts]
    engine = make_engine(
        model, texts=(index_of(), request_index()), overlaps=overlaps, max_batch=3,
        prefill_chunk=16, page_size=4,
    )  # fmt: skip
    requests = [
        request_of(str(i), p, 20, capture=i % 4 != 1, tenant=f"{i % 2}", temperature=0.0)
        for i, p in enumerate(prompts)
    ]

    got = run(engine, requests, assert_texts_are_kept)

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    used = {drafter for drafter, _ in engine.figures().steps_by_arm}
    assert used > {"eagle3", "suffix", "suffix_request"}
    assert engine.figures().cached_prompt_tokens > 0


@pytest.mark.parametrize("device", DEVICES)
def test_programs_that_are_replayed_draft_the_same(device):
    """Greedy and seeded answers that loop and repeat each other, beside those of plain decoding."""
    prompts = random_prompts(random.Random(7), 8, 40)
    asked = [(p, fields) for p in prompts for fields in ({}, {"temperature": 0.4, "seed": 5})]
    asked += asked[:4]
    found = []
    for policy in (FixedPolicy("none", 0), SUFFIX):
        engine = engine_on(
            device, random_model("llama", head_dim=64), policy=policy, texts=(index_of(device),),
            max_batch=4, prefill_chunk=16,
        )  # fmt: skip
        requests = [request_of(str(n), p, 40, **fields) for n, (p, fields) in enumerate(asked)]
        got = run(engine, requests, assert_texts_are_kept)
        found.append([got[r.id].token_ids for r in requests])

    assert found[0] == found[1]
    assert engine.figures().num_accepted_tokens > 25  # of the four that are asked for again


class Doubtful(DeviceIndex):
    """Proposes tokens whatever the text is, so that a law is tested with proposals that are often
    wrong."""

    def propose(self, texts_LN, opened, num_draft):
        number = torch.arange(num_draft) + opened.lanes_R[:, None]
        counts = 1 + opened.lanes_R.long() % num_draft
        return TextDrafts(number % V, counts, opened.lanes_R.long())


def begun_anyhow(_counts, found, opened, num_draft, num_passes):
    """In place of ``begin_drafts``: none, some or all tokens from text, whatever was kept."""
    text_R = (opened.lanes_R.long() // 3) % (num_draft + 1)
    text_R = torch.minimum(text_R, found.counts_R)
    lens_R = torch.minimum(opened.lens_R, text_R.clamp(min=num_passes))
    who_R = torch.where(text_R < lens_R, TEXT_FIRST, TEXT_ALONE)
    who_R = torch.where(text_R == 0, NEURAL_ALONE, who_R)
    return Begun(text_R, lens_R, who_R, torch.arange(num_draft) < text_R[:, None])


@pytest.mark.parametrize(
    ("shape", "rule", "mixed"),
    [
        *product(("greedy", "whole"), [Rule.BLOCK], (None, "eagle3")),
        *product(["truncated"], [Rule.STANDARD], (None, "eagle3")),
        ("whole", Rule.STANDARD, "dflash"),
        ("truncated", Rule.BLOCK, "p_eagle"),
        ("whole", Rule.STANDARD, "mtp"),
        ("truncated", Rule.BLOCK, "draft_model"),
    ],  # of text alone, and of text that each neural drafter goes on with
)
def test_the_joint_law_is_the_targets_where_drafts_are_often_wrong(shape, rule, mixed, monkeypatch):
    monkeypatch.setattr(text_mix, "begin_drafts", begun_anyhow)
    monkeypatch.setattr(text_mix, "MOST_PASSES", 2)
    fields = SHAPES.get(shape, {"temperature": 0.0})
    index = Doubtful("suffix", DEVICE_TRAITS, Bounds(2, 8), 0, CPU)
    policy = FixedPolicy(f"{mixed}+suffix" if mixed else "suffix", 3, needs_match=False)
    engine = make_engine(
        soft_target("opposed"), kind=mixed or "eagle3", texts=(index,), mixes_index=True, rule=rule,
        policy=policy, max_batch=256, num_pages=1200, prefill_chunk=1024, ring_rows=8192,
        max_draft=3,
    )  # fmt: skip
    requests = [request_of(str(i), LAW_PROMPT, LENGTH + 1, **fields) for i in range(1_500)]

    got = run(engine, requests)

    if shape == "greedy":
        answers = {tuple(one.token_ids) for one in got.values()}
        assert answers == {tuple(reference(soft_target("opposed"), LAW_PROMPT, LENGTH + 1))}
        return
    assert chi_squared_excess(counted(got), expected_law(soft_target("opposed"), SHAPES[shape])) < 1
    drafted = engine.figures().drafters
    assert all(drafted[kind].tokens > 300 for kind in ([mixed] if mixed else []) + ["suffix"])


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_mix_follows_the_target_with_swaps_in_the_middle(architecture):
    numbers = random.Random(4)
    model = random_model(architecture)
    prompts = random_prompts(numbers, 7, 60)
    prompts += prompts[:3]
    expected = [reference(model, prompt, 24) for prompt in prompts]
    engine = make_engine(
        model, kind="eagle3", texts=(index_of(),), mixes_index=True, max_batch=3, page_size=4
    )

    got = run(
        engine, [request_of(str(i), p, 24) for i, p in enumerate(prompts)], scrambled("eagle3")
    )

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    used = {drafter for drafter, _ in engine.figures().steps_by_arm}
    assert used == {"none", "suffix", MIX}


def test_a_mix_says_who_drafted():
    prompt, noted = [5, 9, 11, 4, 7], []
    listeners = Listeners(on_finished=noted.append, on_rounds=lambda *told: rounds.append(told))
    policy, rounds = FixedPolicy(MIX, 3, needs_match=False), []
    model = random_model("qwen3")
    engine = make_engine(
        model, kind="eagle3", weights=new_weights("eagle3", model), texts=(index_of(),),
        mixes_index=True, policy=policy, prefix_cache=False, listeners=listeners,
    )  # fmt: skip
    run(engine, [request_of("first", [*prompt, *prompt, *prompt], 25)])
    run(engine, [request_of("again", [*prompt, *prompt, *prompt], 25)])

    kinds = {
        one.drafter for s in noted for one in round_columns(s.rounds) if len(one.draft_ids)
    }  # fmt: skip
    assert kinds == {"eagle3", "suffix"}
    drafted = engine.figures().drafters
    assert drafted["suffix"].accepted > 10 and drafted["eagle3"].rounds > 0
    assert {kind for kind, _ in rounds} == {"eagle3"}  # only it learns
    told = [proposed for _, of in rounds for proposed, _ in of]
    assert sum(map(bool, told)) == drafted["eagle3"].rounds


def decoded_by(engine, *requests):
    """What the rounds of these requests proposed."""
    found, read = [], engine.programs.rounds.read

    def noting(launched):
        decoded = read(launched)
        found.append(decoded.proposed)
        return decoded

    engine.programs.rounds.read = noting
    run(engine, list(requests))
    return [proposed for proposed in found if proposed is not None]


def mixing_engine(**options):
    model = random_model("qwen3")
    policy = FixedPolicy(MIX, 6, needs_match=False)
    return make_engine(
        model, kind="eagle3", weights=new_weights("eagle3", model), texts=(index_of(),),
        mixes_index=True, policy=policy, prefix_cache=False, **{"max_draft": 6} | options,
    )  # fmt: skip


def test_where_text_is_kept_it_drafts_more_and_the_neural_drafter_goes_on_after_it():
    """Greedy text that loops: at first nobody knows what text is worth."""
    engine = mixing_engine(max_batch=4)
    prompts = [[5 + n, 9, 11, 4, 7] * 3 for n in range(4)]
    rounds = decoded_by(engine, *[request_of(str(n), p, 70) for n, p in enumerate(prompts)])

    told = [pair for one in rounds for pair in zip(one.picks, one.tokens, strict=True)]
    assert {(pick.drafter, pick.reason) for pick, _ in told} >= {
        ("eagle3", "match"), ("suffix", "match")
    }  # fmt: skip
    neural = [len(tokens) for pick, tokens in told if pick.drafter == "eagle3"]
    alone = [
        len(tokens) for pick, tokens in told if pick.drafter == "suffix" and pick.reason == "match"
    ]
    assert max(neural) == text_mix.MOST_PASSES < max(alone) == 6
    assert rounds[0].most == 6
    counts = engine.drafting.mixes[MIX]._counts
    assert counts[TEXT, 0].sum() > 100 and counts[TEXT, 1].sum() == 0


@pytest.mark.parametrize("chosen", [None, frozenset({"eagle3"})], ids=["any", "named"])
def test_a_drafter_that_is_mixed_with_text_drafts_alone_only_for_requests_that_name_it(chosen):
    engine = mixing_engine()
    engine.policy = RandomPolicy(random.Random(4))
    run(engine, [request_of("a", [5, 9, 11, 4, 7], 60, drafters=chosen)])

    used = {drafter for drafter, _ in engine.figures().steps_by_arm} - {"none"}
    assert used == ({"eagle3"} if chosen else {"suffix", MIX})


def test_tokens_of_text_are_certain_in_traces_and_those_after_them_are_not(monkeypatch):
    monkeypatch.setattr(text_mix, "begin_drafts", begun_anyhow)
    engine = mixing_engine(max_batch=24)
    prompts = random_prompts(random.Random(3), 24, 30)
    rounds = decoded_by(
        engine, *[request_of(str(n), p * 2, 12, temperature=0.9) for n, p in enumerate(prompts)]
    )

    reasons = set()
    for one in rounds:
        for pick, tokens, logq in zip(one.picks, one.tokens, one.q_logp, strict=True):
            if not tokens:
                continue
            reasons.add((pick.drafter, pick.reason))
            if pick == Pick("suffix", 1.0, "match"):
                assert not logq
                continue
            assert len(logq) == len(tokens)
            num_certain = sum(value == 0.0 for value in logq)
            assert logq[:num_certain] == [0.0] * num_certain
            assert (num_certain > 0) == (pick.drafter == "suffix")
            assert len(tokens) <= text_mix.MOST_PASSES
    assert len(reasons) == 3


@pytest.mark.parametrize("kind", ["eagle3", "p_eagle", "dflash"])
def test_drafts_begin_with_text_however_a_drafter_chooses_its_tokens(kind, monkeypatch):
    """One by one, or all of a block together."""
    monkeypatch.setattr(text_mix, "begin_drafts", begun_anyhow)
    model, mix = random_model("qwen3"), f"{kind}+suffix"
    engine = make_engine(
        model, kind=kind, weights=new_weights(kind, model), mixes_index=True, max_draft=6,
        texts=(Doubtful("suffix", DEVICE_TRAITS, Bounds(2, 8), 0, CPU),), max_batch=24,
        policy=FixedPolicy(mix, 6, needs_match=False),
    )  # fmt: skip
    begun, read = [], engine.programs.rounds.read

    def noting(launched):
        decoded = read(launched)
        if decoded.proposed is not None and launched.key.num_draft == 6:
            lanes = [sequence.lane for sequence in launched.batch]
            begun.extend(zip(lanes, decoded.proposed.tokens, strict=True))
        return decoded

    engine.programs.rounds.read = noting
    run(engine, [request_of(str(n), [5 + n, 9, 11], 12) for n in range(24)])

    for lane, tokens in begun:
        num_text = min(lane // 3 % 7, 1 + lane % 6)
        expected = [(place + lane) % V for place in range(num_text)]
        assert tokens[:num_text] == expected[: len(tokens)]
    assert len(begun) > 24


def test_a_policy_learns_that_drafts_which_end_early_would_have_failed_there():
    learned, engine = [], mixing_engine(max_batch=4)
    observe = engine.policy.observe
    engine.policy.observe = lambda outcome: (learned.append(outcome), observe(outcome))
    run(engine, [request_of(str(n), [5 + n, 9, 11], 40) for n in range(4)])

    drafted = [one.rows for one in learned if one.decision.draft_k == 6]
    assert drafted and all(set(rows.num_verified) <= {0, 6} for rows in drafted)


def test_a_policy_learns_what_text_alone_would_have_kept_in_rounds_of_a_mix():
    learned, decoded, engine = [], [], mixing_engine(max_batch=1)
    observe, read = engine.policy.observe, engine.programs.rounds.read
    engine.policy.observe = lambda outcome: (learned.append(outcome), observe(outcome))
    engine.programs.rounds.read = lambda launched: decoded.append(read(launched)) or decoded[-1]
    run(engine, [request_of("one", [5, 9, 11, 4, 7] * 3, 70)])

    own = [one.rows.judged["suffix"] for one in learned if one.rows.judged]
    told = [one for one in decoded if one.proposed is not None and one.proposed.judged]
    assert own and len(told) >= len(own)
    assert [one.num_accepted for one in own] == [
        one.proposed.judged.num_kept for one in told[: len(own)]
    ]
    num_alone = num_beside = 0
    for one in told:
        (pick,), (got,) = one.proposed.picks, one.verified.num_accepted
        (decided,), (kept,) = one.proposed.judged.num_decided, one.proposed.judged.num_kept
        assert kept <= decided <= min(got + 1, 6)
        if pick.drafter == "suffix" and pick.reason == "match":  # text has drafted alone
            assert kept == got
            num_alone += 1
        num_beside += kept if pick.drafter == "eagle3" else 0
    assert num_alone > 5 and num_beside > 0


def engine_of(architecture, policy, **options):
    model = random_model(architecture)
    return make_engine(model, texts=(index_of(),), policy=policy, prefix_cache=False, **options)


def drafted(engine, *requests):
    """Draft tokens of all rounds of these requests, which run alone, and their answers."""
    found, read = [], engine.programs.rounds.read

    def noting(launched):
        decoded = read(launched)
        found.extend([] if decoded.proposed is None else decoded.proposed.tokens)
        return decoded

    engine.programs.rounds.read = noting
    got = run(engine, list(requests))
    engine.programs.rounds.read = read
    return found, [got[r.id].token_ids for r in requests]


def test_an_answer_that_is_asked_for_again_is_drafted_whole():
    prompt = [5, 9, 11, 4, 7]
    engine = engine_of("qwen3", SUFFIX)
    first, (answer,) = drafted(engine, request_of("first", prompt, 13))
    again, (same,) = drafted(engine, request_of("again", prompt, 13))

    assert same == answer == reference(random_model("qwen3"), prompt, 13)
    assert again == [answer[1:4], answer[5:8], answer[9:12]]
    assert len(first) > len(again)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"capture": False}, {}), ({"tenant": "a"}, {"tenant": "b"})],
    ids=["not kept", "of another tenant"],
)
def test_text_that_may_not_be_used_is_not(first, second):
    prompt = [5, 9, 11, 4, 7]
    alone = engine_of("qwen3", SUFFIX)
    expected, _ = drafted(alone, request_of("again", prompt, 13, **second))
    engine = engine_of("qwen3", SUFFIX)
    drafted(engine, request_of("first", prompt, 13, **first))

    found, _ = drafted(engine, request_of("again", prompt, 13, **second))

    assert found == expected


def test_a_request_that_chooses_other_drafters_leaves_no_text():
    prompt = [5, 9, 11, 4, 7]
    alone = engine_of("qwen3", SUFFIX)
    expected, _ = drafted(alone, request_of("again", prompt, 13))
    engine = engine_of("qwen3", SUFFIX)
    engine.policy = FixedPolicy("eagle3", 2)
    run(engine, [request_of("first", prompt, 13, drafters=frozenset({"eagle3"}))])
    engine.policy = SUFFIX

    found, _ = drafted(engine, request_of("again", prompt, 13))

    assert found == expected


class InTurn(RandomPolicy):
    """Plain steps, the neural drafter and the index, in turn."""

    arms = (PLAIN, Decision("suffix", 2, 1.0, False, "turn"), Decision("eagle3", 2, 1.0, False, ""))

    def __init__(self):
        super().__init__(0)
        self.num = 0

    def plan(self, obs):
        self.num += 1
        return self.arms[self.num % len(self.arms)]


def test_rounds_with_the_index_are_launched_before_the_last_one_is_read():
    engine = make_engine(
        random_model("qwen3"), texts=(index_of(),), policy=InTurn(), max_batch=2, max_draft=3
    )
    unread, rounds = {"eagle3": [], "suffix": [], "none": []}, engine.programs.rounds
    under_way, launch, read = [], rounds.launch, rounds.read

    def launching(batch, drafter, *rest):
        unread[drafter].append(len(under_way))
        under_way.append(drafter)
        return launch(batch, drafter, *rest)

    def reading(launched):
        under_way.pop()
        return read(launched)

    rounds.launch, rounds.read = launching, reading
    run(engine, [request_of("a", [5, 9, 11, 4, 7], 90)])

    assert len(unread["suffix"]) > 5
    assert set(unread["suffix"][1:]) == {1}
    assert set(unread["eagle3"]) == {0}  # it lacks the rows of the round before


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prompt_of_one_token_is_in_its_lane_too(prefix_cache):
    """The lane holds what another request has left."""
    model = random_model("qwen3")
    engine = make_engine(
        model, texts=(index_of(),), policy=SUFFIX, max_batch=1, prefix_cache=prefix_cache
    )
    requests = [request_of(str(n), [7 + n], 12, tenant=str(n)) for n in range(3)]

    got = run(engine, requests, assert_texts_are_kept)

    reference_of = random_model("qwen3")
    expected = [reference(reference_of, [7 + n], 12) for n in range(3)]
    assert [got[r.id].token_ids for r in requests] == expected


def test_a_target_that_is_replaced_leaves_text_as_it_was():
    engine = make_engine(random_model("qwen3"), texts=(index_of(),), policy=SUFFIX, max_batch=3)

    def between(engine, step):
        if step == 6:
            engine._changed_target(lambda: None)
        assert_texts_are_kept(engine)

    prompts = random_prompts(random.Random(5), 3, 40)
    got = run(engine, [request_of(str(i), p, 30) for i, p in enumerate(prompts)], between)

    model = random_model("qwen3")
    assert [got[str(i)].token_ids for i in range(3)] == [reference(model, p, 30) for p in prompts]


class TestFinishedTexts:
    def written(self, *texts, blocks=4):
        finished = FinishedTexts(blocks * BLOCK, CPU)
        for namespace, tokens in texts:
            finished.begin(namespace)
            finished.finish(torch.tensor(tokens, dtype=torch.int32), namespace)
        return finished

    def test_texts_begin_with_a_block_and_end_with_a_separator(self):
        ring = self.written(("a", [7] * BLOCK), ("b", [8] * 3)).ring

        assert ring.ids_M[: 2 * BLOCK].tolist() == [7] * BLOCK + [END] * BLOCK
        assert ring.ids_M[2 * BLOCK : 3 * BLOCK].tolist() == [8] * 3 + [END] * (BLOCK - 3)
        assert ring.spaces_B.tolist() == [1, 1, 2, 0]
        assert ring.bounds_2.tolist() == [3 * BLOCK, 3 * BLOCK]

    def test_the_end_of_a_text_that_is_too_long_is_kept(self):
        ring = self.written(("a", range(1000)), blocks=2).ring
        assert ring.ids_M.tolist() == [*range(1000 - 2 * BLOCK + 1, 1000), END]

    def test_namespaces_are_forgotten_with_their_last_text(self):
        finished = self.written(("a", [1]), ("b", [2] * 200), ("b", [3]), ("c", [4]))
        assert set(finished._numbers) == {"b", "c"}  # the fourth begins where "a" was
        finished.begin("a")
        assert finished._numbers["a"] == 4
        finished.finish(None, "a")
        assert set(finished._numbers) == {"b", "c"}

    def test_numbers_stay_right_however_texts_come(self):
        numbers, finished = random.Random(0), FinishedTexts(6 * BLOCK, CPU)
        running = []
        for _ in range(400):
            if running and numbers.random() < 0.5:
                name = running.pop(numbers.randrange(len(running)))
                kept = torch.full((numbers.randint(1, 3 * BLOCK),), int(name), dtype=torch.int32)
                finished.finish(kept if numbers.random() < 0.8 else None, name)
            else:
                running.append(str(numbers.randrange(9)))
                finished.begin(running[-1])
            assert set(running) <= set(finished._numbers)
            assert len(set(finished._numbers.values())) == len(finished._numbers)
            ring = finished.ring
            for block, space in enumerate(ring.spaces_B.tolist()):
                there = set(ring.ids_M[block * BLOCK : (block + 1) * BLOCK].tolist()) - {END}
                own = {int(name) for name, number in finished._numbers.items() if number == space}
                assert not there or not own or there == own
