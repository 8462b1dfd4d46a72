"""A drafter's passes in one launch equal the definition, whichever program takes which tile.

Triton's interpreter runs programs one after another, so programs that wait for each other would
never end: here one program runs alone, or several run each phase by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from specops import drafter_chain as definition
from specops import drafter_chain_triton as kernels
from specops.attention import DecodePass
from specops.drafter_chain import ChainText, DrafterLayer
from specops.linear import Norm
from specops.rope import Heads, rope_table

VOCAB, PAGES_EACH = 300, 6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Of a layer that fills no block of the kernel."""

    hidden: int = 48
    inner: int = 88
    num_query: int = 4
    num_kv: int = 2
    head_dim: int = 32
    draft_vocab: int = VOCAB
    page: int = 16


SMOL = "three query heads for each of three key heads, as SmolLM2"
SHAPES = {
    "GQA": Shape(),
    SMOL: Shape(hidden=80, num_query=9, num_kv=3, page=4),
    "a head for each key, reduced vocabulary": Shape(
        num_query=2, num_kv=2, head_dim=16, draft_vocab=23
    ),
    "wide heads, more columns than a block": Shape(hidden=300, inner=40, head_dim=64, num_kv=1),
}


def make_layer(shape: Shape, dtype=torch.float32, device=CPU) -> DrafterLayer:
    generator = torch.Generator().manual_seed(0)

    def weight(rows, columns):
        drawn = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return drawn.to(device, dtype)

    def norm(eps):
        drawn = 1 + torch.randn(shape.hidden, generator=generator) / 4
        return Norm(drawn.to(device, dtype), eps)

    s = shape
    frequency = 1e4 ** -(torch.arange(0, s.head_dim, 2) / s.head_dim)
    ids = torch.arange(s.draft_vocab)
    return DrafterLayer(
        embed_VtH=weight(VOCAB, s.hidden) * 3,
        input_norm=norm(1e-5),
        hidden_norm=norm(1e-6),
        qkv=weight((s.num_query + 2 * s.num_kv) * s.head_dim, 2 * s.hidden),
        heads=Heads(s.num_query, s.num_kv),
        table=rope_table(frequency.to(device), 1.0, 256, dtype),
        o_HC=weight(s.hidden, s.num_query * s.head_dim),
        post_norm=norm(1e-5),
        gate_up=weight(2 * s.inner, s.hidden),
        down_HI=weight(s.hidden, s.inner),
        norm=norm(1e-5),
        head_VH=weight(s.draft_vocab, s.hidden) * 3,
        d2t_V=None if s.draft_vocab == VOCAB else (2 * ids).to(device),
    )


def make_rows(shape: Shape, num_rows: int, dtype=torch.float32, device=CPU, first=None):
    """(Tokens, hidden rows that are not adjacent, a pass, keys, values); contexts of 0 to 90."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    hidden = torch.randn(num_rows, 2 * shape.hidden, generator=generator)[:, : shape.hidden]
    order = torch.randperm(num_rows * PAGES_EACH, generator=generator) + 1
    pages = order.view(num_rows, PAGES_EACH).int()
    if first is None:
        first = (7 * torch.arange(num_rows) + 3) % (PAGES_EACH * shape.page - 6)
    at = DecodePass(
        pages.to(device), torch.as_tensor(first, dtype=torch.int32).to(device), shape.page,
        first_key=1,
    )  # fmt: skip
    pool = ((num_rows * PAGES_EACH + 1) * shape.page, shape.num_kv, shape.head_dim)
    keys, values = (torch.randn(pool, generator=generator).to(device, dtype) for _ in range(2))
    return ids.to(device), hidden.to(device, dtype), at, keys, values


def relative_error(got, want):
    return ((got - want).double().norm() / want.double().norm()).item()


def both_passes(layer, rows, meeting, **how):
    """What a pass leaves, by the kernel and by the definition: outputs, keys and values."""
    ids, hidden, at, *pool = rows
    ours, theirs = [t.clone() for t in pool], [t.clone() for t in pool]
    found = kernels.run_pass(layer, ids, hidden, at, *ours, meeting, **how)
    number = how.get("number", 1)
    here = replace(at, first_R=at.first_R + number - 1)
    want = definition.run_pass(layer, ids, hidden, here, *theirs)
    squares = found.squares_RP.sum(dim=1)
    torch.testing.assert_close(squares, found.outputs.float().pow(2).sum(dim=1))
    return (found.outputs, *ours), (want, *theirs)


@pytest.mark.parametrize(
    ("name", "num_rows"), [*((name, 3) for name in SHAPES), (SMOL, 1), (SMOL, 32)]
)
def test_a_pass_equals_the_definition(name, num_rows):
    layer = make_layer(SHAPES[name])
    meeting = kernels.make_meeting(CPU, 1)

    got, want = both_passes(layer, make_rows(SHAPES[name], num_rows), meeting)

    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    assert not meeting.gave_up()


@pytest.mark.parametrize(
    ("num_rows", "num_programs"), [(1, 2), (1, 132), (3, 5), (3, 40), (32, 5), (32, 132)]
)
def test_every_tile_is_one_program_s(num_programs, num_rows):
    """Each phase by itself, on more and on fewer programs than it has tiles. Keys are read in up to
    four parts."""
    shape = SHAPES[SMOL]
    layer, meeting = make_layer(shape), kernels.make_meeting(CPU, num_programs)
    rows = make_rows(shape, num_rows)
    if num_rows == 1:
        rows = make_rows(replace(shape, page=64), 1, first=[200])

    got, want = both_passes(layer, rows, meeting, apart=True)

    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(("num_programs", "apart"), [(1, False), (3, True)])
@pytest.mark.parametrize(
    ("name", "num_rows"), [*((name, 3) for name in SHAPES), (SMOL, 1), (SMOL, 32)]
)
def test_a_chain_drafts_the_same_tokens(name, num_rows, num_programs, apart):
    layer = make_layer(SHAPES[name])
    _, outputs, at, *pool = make_rows(SHAPES[name], num_rows)
    ours, theirs = [t.clone() for t in pool], [t.clone() for t in pool]
    meeting = kernels.make_meeting(CPU, num_programs)

    got = kernels.draft(layer, outputs, at, 4, *ours, meeting, apart=apart).tokens_RK
    want = definition.draft(layer, outputs, at, 4, *theirs)

    assert torch.equal(got, want) and got.shape == (num_rows, 4)
    assert num_rows == 1 or len(want.unique()) > 4
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-6


@pytest.mark.parametrize("num_draft", [1, 3])
def test_known_tokens_are_taken(num_draft):
    """What is drafted after them depends on them."""
    shape = SHAPES["a head for each key, reduced vocabulary"]
    layer, meeting = make_layer(shape), kernels.make_meeting(CPU, 1)
    _, outputs, at, *pool = make_rows(shape, 3)
    generator = torch.Generator().manual_seed(2)
    text = ChainText(
        torch.randint(0, VOCAB, (3, 5), generator=generator),
        torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool),
    )
    ours, theirs = [t.clone() for t in pool], [t.clone() for t in pool]

    got = kernels.draft(layer, outputs, at, num_draft, *ours, meeting, text).tokens_RK
    want = definition.draft(layer, outputs, at, num_draft, *theirs, text)

    assert torch.equal(got, want)
    is_text = text.is_text_RK[:, :num_draft]
    assert torch.equal(got[is_text], text.tokens_RK[:, :num_draft][is_text])


def test_rows_without_a_place():
    """Padding, the first position of all, and positions around the end of the page table."""
    shape = Shape(page=4)
    end = PAGES_EACH * shape.page
    rows = make_rows(shape, 7, first=[-3, -1, 0, 1, end - 1, end, end + 2])
    layer, meeting = make_layer(shape), kernels.make_meeting(CPU, 1)

    for number in (1, 2, 3):
        got, want = both_passes(layer, rows, meeting, number=number)
        assert relative_error(got[0], want[0]) < 1e-6
        for ours, theirs in zip(got[1:], want[1:], strict=True):  # slot 0 takes what nobody reads
            assert relative_error(ours[1:], theirs[1:]) < 1e-6


def test_nan_in_keys_that_nobody_sees_changes_nothing():
    shape = Shape()
    ids, hidden, at, keys, values = make_rows(shape, 3, first=[5, 17, 40])
    slots = torch.arange(PAGES_EACH * shape.page)
    for request, first in enumerate(at.first_R.tolist()):
        unseen = slots[first:]
        place = at.pages_RP[request, unseen // shape.page].long() * shape.page + unseen % shape.page
        keys[place] = values[place] = float("nan")
    layer, meeting = make_layer(shape), kernels.make_meeting(CPU, 1)

    found = kernels.run_pass(layer, ids, hidden, at, keys.clone(), values.clone(), meeting)
    want = definition.run_pass(layer, ids, hidden, at, keys, values)

    assert relative_error(found.outputs, want) < 1e-6


@pytest.mark.parametrize("num_rows", [1, 17])
def test_half_precision_is_as_the_definition_s(num_rows):
    """Interpreted Triton has no bfloat16."""
    shape = SHAPES[SMOL]
    layer, meeting = make_layer(shape, torch.float16), kernels.make_meeting(CPU, 1)

    got, want = both_passes(layer, make_rows(shape, num_rows, torch.float16), meeting)

    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float16 and relative_error(ours, theirs) < 1e-3


def test_ties_go_to_the_lowest_id_and_nan_ranks_first():
    shape = Shape(draft_vocab=VOCAB)
    layer = make_layer(shape)
    head = layer.head_VH.zero_()
    head[5:, 0] = 1.0  # logits are exactly the first column or 0
    _, outputs, at, *pool = make_rows(shape, 3)
    outputs[1] *= -1
    for num_programs in (1, 3):
        meeting = kernels.make_meeting(CPU, num_programs)
        found = kernels.draft(layer, outputs, at, 1, *pool, meeting, apart=num_programs > 1)
        want = definition.draft(layer, outputs, at, 1, *pool)
        assert torch.equal(found.tokens_RK, want) and set(want.flatten().tolist()) == {0, 5}
        head[66] = float("nan")
        found = kernels.draft(layer, outputs, at, 1, *pool, meeting, apart=num_programs > 1)
        assert found.tokens_RK.eq(66).all()
        head[66] = head[5]


def test_ties_among_parts_go_to_the_lowest_id():
    """A program has tiles on both sides of another's."""
    num_programs, tile = 65, 64
    shape = Shape(hidden=16)
    layer = replace(make_layer(shape), head_VH=torch.zeros(140 * tile, 16))
    _, outputs, at, *pool = make_rows(shape, 1)
    outputs[0, 0] = 1.0
    for ids in ([65, 64, 130], [129, 65, 66], [130, 131, 139]):
        layer.head_VH.zero_()[torch.tensor(ids) * tile + 3, 0] = 1.0
        meeting = kernels.make_meeting(CPU, num_programs)
        found = kernels.draft(layer, outputs, at, 1, *pool, meeting, apart=True)
        assert found.tokens_RK.tolist() == [[min(ids) * tile + 3]]


def test_meeting_changes_the_sign_of_the_counter_alone():
    """So the next launch, whatever it is, finds it as it must be."""
    for num_programs in (1, 2, 132):
        added = kernels._lead(num_programs) + num_programs - 1
        assert added % (1 << 32) == 1 << 31
        assert -(1 << 31) <= kernels._lead(num_programs) < 1 << 31
    layer, meeting = make_layer(Shape()), kernels.make_meeting(CPU, 1)
    _, outputs, at, *pool = make_rows(Shape(), 2)
    for _ in range(2):
        kernels.draft(layer, outputs, at, 2, *pool, meeting)
        assert int(meeting.counter[0]) in (0, -(1 << 31))
    assert not meeting.counter[1:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rows": 33}, "takes 1..32 rows, got 33"),
        ({"page": 12}, "the page size 12 is not a power of two"),
        ({"head_dim": 8}, "the head dimension 8 is below 16"),
        ({"num_draft": 65}, "must be of 1..64 tokens, got 65"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, message):
    num_rows, num_draft = change.pop("num_rows", 2), change.pop("num_draft", 2)
    shape = replace(Shape(), **change)
    _, outputs, at, *pool = make_rows(shape, num_rows)
    layer, meeting = make_layer(shape), kernels.make_meeting(CPU, 1)

    with pytest.raises(ValueError, match=message):
        kernels.draft(layer, outputs, at, num_draft, *pool, meeting)
    assert num_draft == 65 or not kernels.takes(layer, outputs, at)


@pytest.mark.gpu
@pytest.mark.parametrize("cooperative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_programs_that_meet_equal_the_definition(num_rows, dtype, cooperative):
    """Compiled, on all multiprocessors; many times, as programs that do not wait may be lucky."""
    device = torch.device("cuda")
    shape = Shape(hidden=576, inner=1536, num_query=9, num_kv=3, head_dim=64)
    layer = make_layer(shape, dtype, device)
    meeting = kernels.make_meeting(device, cooperative=cooperative)
    rows = make_rows(shape, num_rows, dtype, device)

    for _ in range(50):
        got, want = both_passes(layer, rows, meeting)
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        for ours, theirs in zip(got, want, strict=True):
            assert relative_error(ours, theirs) < bound
    first = kernels.draft(layer, *rows[1:3], 4, *rows[3:], meeting).tokens_RK
    for _ in range(50):
        assert torch.equal(kernels.draft(layer, *rows[1:3], 4, *rows[3:], meeting).tokens_RK, first)
    assert not meeting.gave_up()
