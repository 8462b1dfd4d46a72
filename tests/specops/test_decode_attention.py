"""Decode attention, as definition and as kernels (interpreted without a GPU), equals attention over
each row's own path in float64. Unwritten slots hold NaN.

No drafter drafts trees yet: the cases below are the only users of ``DecodePass.ancestors_RQ`` and
``counts_R``, which such a drafter will need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from specops import attention, attention_triton
from specops.attention import DecodePass, decode_attention
from specops.attention_triton import Tiling
from specops.overlap_triton import can_overlap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 4
SCALE = 0.3
IMPLEMENTATIONS = [
    pytest.param((attention.attend_pages, attention.write_rows), id="definition"),
    *(
        pytest.param(
            (
                partial(attention_triton.attend_pages, num_parts=parts),
                attention_triton.write_rows,
            ),
            id=f"kernel, parts {parts}",
        )
        for parts in (1, 3)
    ),
]
CHAIN = (0b1, 0b11, 0b111, 0b1111)
TREE = (0b1, 0b11, 0b101, 0b1101)  # 0 -> 1, 0 -> 2 -> 3


@dataclass(frozen=True)
class Case:
    """Requests, given by their first position; for a tree, the path of each row."""

    firsts: tuple[int, ...] = (9, 290, 0, 130)
    num_query: int = 4
    heads: tuple[int, int] = (4, 2)
    counts: tuple[int, ...] | None = None
    trees: tuple[tuple[int, ...], ...] | None = None
    window: int | None = None
    softcap: float | None = None
    first_key: int = 0
    head_dim: int = 16
    is_block: bool = False

    def row(self, request: int, j: int) -> tuple[int, int] | None:
        """A row's position and the bits of its path; ``None`` for padding."""
        count = self.num_query if self.counts is None else self.counts[request]
        if j >= count or self.firsts[request] + j < 0:
            return None
        if self.is_block:
            return self.firsts[request] + j, (1 << self.num_query) - 1
        bits = (2 << j) - 1 if self.trees is None else self.trees[request][j]
        return self.firsts[request] + j, bits


CASES = {
    "one row": Case(num_query=1, firsts=(0, 300, 127, 128)),
    "chain": Case(),
    "no sharing": Case(heads=(2, 2), first_key=1),
    "sixteen share": Case(heads=(16, 1), window=7, first_key=1),
    "rows of several tiles": Case(num_query=18, heads=(8, 1), firsts=(130,)),
    "counts, one none": Case(counts=(4, 1, 0, 2)),
    "padding requests": Case(firsts=(-4, 200, -1000, -2)),
    "short window, softcap": Case(window=3, softcap=2.0),
    "window over blocks": Case(window=150, firsts=(290, 400, 149, 10)),
    "blocks": Case(num_query=6, firsts=(9, 290, 0, -2), is_block=True, first_key=1),
    "blocks in a window": Case(num_query=9, firsts=(3, 140), is_block=True, window=12),
    "trees": Case(trees=(TREE, CHAIN, TREE, TREE)),
    "trees in a window": Case(
        trees=(TREE, CHAIN, TREE, TREE), window=5, counts=(4, 4, 3, 0), first_key=1
    ),
}


def want_row(case, q, k, v, position, bits, first):
    """Attention of one row q [Hq, D] over its request's k, v [S, Hkv, D], in float64. [Hq, D]."""
    path = [first + i for i in range(case.num_query) if bits >> i & 1 and first + i >= 0]
    keys = [*range(max(first, 0)), *path]
    # The row itself is the last one on its own path.
    keys = [key for at, key in enumerate(keys) if key >= case.first_key]
    if case.is_block and case.window is not None:
        keys = [key for key in keys if key > position - case.window]
    elif case.window is not None:
        keys = keys[-min(case.window, len(keys)) :]
    if not keys:
        return torch.zeros_like(q)
    repeat = q.shape[0] // k.shape[1]
    k, v = (t[keys].double().repeat_interleave(repeat, dim=1) for t in (k, v))
    scores = torch.einsum("hd,shd->hs", q.double(), k) * SCALE
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v).float()


@dataclass(frozen=True)
class Scene:
    """A pass with its pools, and the expected output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    decode: DecodePass
    want: torch.Tensor
    new_slots: set[int]


def scene(case: Case, seed: int = 0) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv), dim = case.heads, case.head_dim
    num_requests, num_query = len(case.firsts), case.num_query
    num_pages = (max(case.firsts) + num_query) // PAGE + 2
    pool_pages = num_pages * num_requests + 1
    keys = torch.full((pool_pages * PAGE, num_kv, dim), float("nan"))
    values = keys.clone()
    shuffled = (torch.randperm(pool_pages - 1, generator=generator) + 1).int()
    pages = torch.zeros(num_requests, num_pages, dtype=torch.int32)
    q = torch.randn(num_requests, num_query, num_heads, dim, generator=generator)
    new = torch.randn(2, num_requests, num_query, num_kv, dim, generator=generator)
    want, new_slots = torch.zeros_like(q), set()
    for r, first in enumerate(case.firsts):
        used = max(0, (first + num_query - 1) // PAGE + 1)
        pages[r, :used] = shuffled[r * num_pages : r * num_pages + used]
        slots = (pages[r, :, None] * PAGE + torch.arange(PAGE)).flatten().long()
        old = torch.randn(2, max(first, 0), num_kv, dim, generator=generator)
        keys[slots[case.first_key : max(first, 0)]] = old[0, case.first_key :]
        values[slots[case.first_key : max(first, 0)]] = old[1, case.first_key :]
        k, v = torch.cat((old, new[:, r, max(-first, 0) :]), dim=1)
        for j in range(num_query):
            if (row := case.row(r, j)) is not None:
                want[r, j] = want_row(case, q[r, j], k, v, *row, first)
                new_slots.add(int(slots[row[0]]))
    decode = DecodePass(
        pages.to(DEVICE),
        torch.tensor(case.firsts, dtype=torch.int32, device=DEVICE),
        PAGE,
        None if case.counts is None else torch.tensor(case.counts, device=DEVICE).int(),
        None if case.trees is None else torch.tensor(case.trees, device=DEVICE),
        case.first_key,
        case.is_block,
    )
    packed = (t.flatten(0, 1).to(DEVICE) for t in (q, *new))
    return Scene(*packed, keys.to(DEVICE), values.to(DEVICE), decode, want.flatten(0, 1), new_slots)


def run(case: Case, made: Scene, implementation) -> torch.Tensor:
    attend, write = implementation
    return decode_attention(
        made.q, made.k, made.v, made.keys, made.values, made.decode, SCALE, case.window,
        case.softcap, attend, write,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_sees_its_own_path(case, implementation):
    made = scene(case)

    got = run(case, made, implementation)

    torch.testing.assert_close(got.cpu(), made.want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("write", [attention.write_rows, attention_triton.write_rows])
@pytest.mark.parametrize("name", ["chain", "counts, one none", "padding requests"])
def test_rows_go_to_their_slots_and_padding_to_slot_0(name, write):
    made = scene(CASES[name])
    before = made.keys.clone()

    write(made.k, made.v, made.keys, made.values, made.decode)

    for pool, rows in ((made.keys, made.k), (made.values, made.v)):
        slots = attention.decode_slots(made.decode, CASES[name].num_query)
        assert set(slots.tolist()) - {0} == made.new_slots
        is_real = slots > 0
        assert torch.equal(pool[slots[is_real]], rows[is_real])
    changed = (~(made.keys == before) & ~(made.keys.isnan() & before.isnan())).any(2).any(1)
    assert set(changed.nonzero()[:, 0].tolist()) - {0} == made.new_slots


def test_rows_beyond_the_table_go_to_slot_0():
    decode = DecodePass(
        torch.ones(1, 2, dtype=torch.int32, device=DEVICE),
        torch.tensor([6], dtype=torch.int32, device=DEVICE),
        PAGE,
    )
    new = torch.ones(4, 1, 16, device=DEVICE)
    for write in (attention.write_rows, attention_triton.write_rows):
        pools = torch.zeros(2, 3 * PAGE, 1, 16, device=DEVICE)
        write(new, new, *pools, decode)
        assert pools[..., 0, 0].nonzero()[:, 1].tolist() == [0, 6, 7] * 2
    assert attention.decode_slots(decode, 4).tolist() == [6, 7, 0, 0]


def test_a_written_pass_needs_no_rows():
    case = CASES["chain"]
    made = scene(case)
    attention.write_rows(made.k, made.v, made.keys, made.values, made.decode)

    got = decode_attention(made.q, None, None, made.keys, made.values, made.decode, SCALE)

    torch.testing.assert_close(got.cpu(), made.want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_may_be_views_of_one_projection(implementation):
    case = CASES["chain"]
    made = scene(case)
    (heads, kv), count = case.heads, len(made.q)
    whole = torch.cat((made.q, made.k, made.v), dim=1).flatten(1)
    q, k, v = whole.split([heads * case.head_dim, kv * case.head_dim, kv * case.head_dim], dim=1)
    views = replace(
        made,
        q=q.view(count, heads, -1),
        k=k.view(count, kv, -1),
        v=v.view(count, kv, -1),
    )

    got = run(case, views, implementation)

    torch.testing.assert_close(got.cpu(), made.want, atol=2e-6, rtol=1e-5)


def test_a_tree_is_not_a_chain():
    """Without ancestors the same tree gives a wrong result, so the cases above can fail."""
    made = scene(CASES["trees"])
    chain = replace(made, decode=replace(made.decode, ancestors_RQ=None))

    got = run(CASES["trees"], chain, (attention_triton.attend_pages, attention_triton.write_rows))

    assert (got.cpu() - made.want).abs().amax(dim=(1, 2)).view(4, 4)[0, 2:].min() > 1e-2


def parts_of(num_requests, num_keys, num_query=1):
    """``attention_triton.parts_of`` with the heads of Qwen3-8B."""
    return attention_triton.parts_of(num_requests, 8, 4 * num_query, num_keys, 128, 2)


def test_parts_fill_the_gpu_but_are_not_too_short():
    assert parts_of(1, 2048) == 16  # of 128 keys, the shortest
    assert parts_of(1, 32768) * 8 >= 132  # a program for every multiprocessor
    assert parts_of(1, 64) == 1
    assert parts_of(128, 32768) == 1  # several waves even unsplit


def test_a_nearly_empty_last_wave_is_split():
    """512 programs are a wave of 396 and a third of one; 1,024 end in two thirds of one. With more
    rows 264 run at once, and 512 are nearly two waves."""
    assert parts_of(64, 2048) == parts_of(64, 40960) == 2
    assert parts_of(64, 2048, num_query=5) == 1


@pytest.mark.parametrize("num_query", [1, 2, 5, 16])
@pytest.mark.parametrize("num_requests", [1, 2, 4, 8, 16, 24, 32, 48, 64, 128])
def test_a_wider_table_never_gets_fewer_parts(num_requests, num_query):
    widths = [16, 512, 2048, 4096, 8192, 40960, 262144]
    parts = [parts_of(num_requests, width, num_query) for width in widths]

    assert parts == sorted(parts)
    assert 8 * num_requests * parts[-1] >= 132  # no multiprocessor is left without a program


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
def test_any_shape_gets_parts_within_limits(head_dim, element_size):
    for num_requests in (1, 3, 24, 48, 100, 1000):
        for num_kv, num_rows in ((1, 1), (2, 8), (8, 20), (32, 5), (1, 300)):
            for num_keys in (1, 127, 300, 5000, 131072):
                parts = attention_triton.parts_of(
                    num_requests, num_kv, num_rows, num_keys, head_dim, element_size
                )
                assert 1 <= parts <= max(1, min(64, num_keys // 128))


def test_the_cut_depends_on_the_table_and_not_on_lengths(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_triton, "parts_of", lambda *shape: asked.append(shape) or 2)
    made = scene(CASES["chain"])
    for first_R in (made.decode.first_R, made.decode.first_R // 4):
        decode = replace(made.decode, first_R=first_R)
        attention_triton.attend_pages(made.q, made.keys, made.values, decode, SCALE)

    assert len(asked) == 2
    assert asked[0] == asked[1] == (4, 2, 8, made.decode.pages_RP.shape[1] * PAGE, 16, 4)


@pytest.mark.parametrize("num_parts", [2, 3, 36])
@pytest.mark.parametrize("tiling", [Tiling(16, 32, 4), Tiling(32, 16, 4, 2), Tiling(16, 64, 4)])
def test_a_tile_of_any_size_equals_the_definition(tiling, num_parts):
    case = CASES["trees"]
    cut = partial(attention_triton.attend_pages, num_parts=num_parts, tiling=tiling)

    got = run(case, made := scene(case), (cut, attention_triton.write_rows))

    torch.testing.assert_close(got.cpu(), made.want, atol=2e-6, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    pages, first = torch.zeros(2, 3).int(), torch.zeros(2).int()
    with pytest.raises(ValueError, match=r"pages must be torch.int32 of 2 dimensions for 2"):
        DecodePass(pages.long(), first, PAGE)
    with pytest.raises(ValueError, match=r"first must be torch.int32 .* got torch.int32 \(3,\)"):
        DecodePass(pages, torch.zeros(3).int(), PAGE)
    decode = DecodePass(pages, first, PAGE)
    with pytest.raises(ValueError, match="3 rows do not divide among 2 requests"):
        decode.num_query(3)
    tree = DecodePass(pages, first, PAGE, ancestors_RQ=torch.ones(2, 4).long())
    with pytest.raises(ValueError, match=r"ancestors must be \[2, 3\]"):
        tree.num_query(6)
    with pytest.raises(ValueError, match="a window of 3 is shorter than a tree of 4 rows"):
        attention.visible_keys(tree, 4, 3)
    q, pool = torch.zeros(2, 8, 24), torch.zeros(12, 2, 24)
    with pytest.raises(ValueError, match="power of two and at least 16, got 24"):
        attention_triton.attend_pages(q, pool, pool, decode, 1.0)
    q, pool = torch.zeros(2, 8, 16), torch.zeros(12, 16, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        attention_triton.attend_pages(q, pool, pool, decode, 1.0)


def large(num_requests, num_query, heads, head_dim, longest, page_size=16, seed=0):
    """Random rows, pools and lengths in bfloat16; some requests are padding."""
    generator = torch.Generator("cuda").manual_seed(seed)
    num_pages = longest // page_size
    pool_pages = num_requests * num_pages + 1

    def normal(*shape):
        rows = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return rows

    pools = (normal(pool_pages * page_size, heads[1], head_dim) for _ in range(2))
    pages = torch.randperm(pool_pages - 1, generator=generator, device="cuda").int() + 1
    first = torch.randint(
        0, longest - num_query, (num_requests,), generator=generator, device="cuda"
    ).int()
    first[0] = longest - num_query
    first[1] = -num_query
    decode = DecodePass(pages.view(num_requests, num_pages), first, page_size)
    new = (normal(num_requests * num_query, h, head_dim) for h in (heads[0], heads[1], heads[1]))
    return *new, *pools, decode


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_query", "heads", "head_dim", "window", "softcap"),
    [
        pytest.param(1, (32, 8), 128, None, None, id="Qwen3-8B, one row"),
        pytest.param(5, (32, 8), 128, None, None, id="Qwen3-8B, five rows"),
        pytest.param(16, (32, 8), 128, None, None, id="Qwen3-8B, sixteen rows"),
        pytest.param(5, (8, 4), 256, 512, 50.0, id="Gemma's heads"),
        pytest.param(16, (16, 1), 128, None, None, id="sixteen share a key"),
        pytest.param(5, (16, 8), 64, None, None, id="small heads"),
    ],
)
@pytest.mark.parametrize("num_requests", [4, 32])
def test_bfloat16_is_close_at_real_shapes(
    num_requests, num_query, heads, head_dim, window, softcap
):
    q, k, v, keys, values, decode = large(num_requests, num_query, heads, head_dim, 2048)
    scale = head_dim**-0.5

    got = decode_attention(
        q, k, v, keys, values, decode, scale, window, softcap,
        attention_triton.attend_pages, attention_triton.write_rows,
    )  # fmt: skip

    wide = (t.double() for t in (q, keys, values))
    want = attention.attend_pages(*wide, decode, scale, window, softcap)
    assert relative_error(got, want) < 1e-2
    assert got[num_query : 2 * num_query].abs().max() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [Tiling(32, 128, 8, 2), Tiling(64, 32, 4, 4)])
@pytest.mark.parametrize(("num_parts", "overlap"), [(1, False), (3, False), (3, True)])
def test_every_cut_is_close_at_real_shapes(tiling, num_parts, overlap):
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    q, k, v, keys, values, decode = large(16, 5, (32, 8), 128, 2048)
    attention_triton.write_rows(k, v, keys, values, decode)

    got = attention_triton.attend_pages(
        q, keys, values, decode, 0.1, num_parts=num_parts, tiling=tiling, overlap=overlap
    )

    wide = (t.double() for t in (q, keys, values))
    assert relative_error(got, attention.attend_pages(*wide, decode, 0.1)) < 1e-2


@pytest.mark.gpu
def test_a_captured_pass_follows_lengths_and_pages():
    q, k, v, keys, values, decode = large(16, 5, (32, 8), 128, 1024)
    made = large(16, 5, (32, 8), 128, 1024, seed=1)

    def step():
        return decode_attention(
            q, k, v, keys, values, decode, 0.1, None, None,
            attention_triton.attend_pages, attention_triton.write_rows,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for t, other in zip((q, k, v), made[:3], strict=True):
        t.copy_(other)
    decode.pages_RP.copy_(made[5].pages_RP)
    decode.first_R.copy_(made[5].first_R)
    graph.replay()

    wide = (t.double() for t in (q, keys, values))
    want = attention.attend_pages(*wide, decode, 0.1)
    assert relative_error(out, want) < 1e-2
    slots = attention.decode_slots(decode, 5)
    assert torch.equal(keys[slots[slots > 0]], k[slots > 0])


@pytest.mark.gpu
def test_the_definition_can_be_captured():
    q, k, v, keys, values, decode = large(4, 5, (4, 2), 64, 256)
    want = decode_attention(q, k, v, keys, values, decode, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, keys, values, decode, 0.1)
    graph.replay()

    torch.testing.assert_close(out, want)
