"""Committed rows are packed into the ring in order and quantised as in traces. Definition and
kernels (interpreted without a GPU) are bitwise equal."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from specops import capture_pack, capture_pack_triton
from specops.capture_pack import PackRing, new_ring, quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKERS = [
    pytest.param(capture_pack.pack_kept_rows, id="definition"),
    pytest.param(capture_pack_triton.pack_kept_rows, id="kernel"),
]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def step(generator, num_rows, num_layers=3, hidden_size=48):
    """Features and last hidden rows of many magnitudes; one vector is zero."""
    shape = (num_rows, num_layers + 1, hidden_size)
    rows = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(
        -6, 4, shape[:2], generator=generator
    ).unsqueeze(-1)
    rows[0, 1] = 0
    rows = rows.bfloat16().to(DEVICE)
    return rows[:, :-1].contiguous(), rows[:, -1].contiguous()


def bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("pack", PACKERS)
def test_kept_rows_follow_each_other_around_the_ring(pack, is_fp8):
    generator = torch.Generator().manual_seed(0)
    ring = new_ring(16, 4, 48, DEVICE, is_fp8, pinned=False)
    first = ints(100, 7, 30, 0)
    want = []  # (lane, position, features, hidden) of every kept row
    for counts in ((3, 0, 1, 2), (0, 0, 0, 0), (3, 3, 2, 3), (1, 0, 3, 1)):
        features, hidden = step(generator, 12)

        pack(features, hidden, ints(*counts), first, ints(5, 2, 9, 0), ring)

        for request, count in enumerate(counts):
            for j in range(count):
                row = request * 3 + j
                place = ((5, 2, 9, 0)[request], int(first[request]) + j)
                want.append((*place, torch.cat((features[row], hidden[row : row + 1]))))
        first += ints(*counts)
        assert ring.next_1.tolist() == [len(want)]
    assert len(want) == 22  # more than the ring holds
    for number in range(len(want) - 16, len(want)):
        lane, position, rows = want[number]
        at = number % 16
        assert (int(ring.lanes[at]), int(ring.positions[at])) == (lane, position)
        if not is_fp8:
            assert torch.equal(bits(ring.rows[at]), bits(rows))
            continue
        packed, scales = quantise(rows.cpu())
        assert torch.equal(bits(ring.rows[at]), bits(packed))
        assert torch.equal(ring.scales[at].cpu(), scales)


@triton.jit
def _round_kernel(in_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, capture_pack_triton._rounded_to_e4m3(tl.load(in_ptr + i)))


def test_rounding_is_that_of_torch_between_all_numbers():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    least = torch.full_like(middle, torch.inf)
    near = torch.cat((numbers, middle, middle.nextafter(least), middle.nextafter(-least)))
    near = torch.cat((near, -near, torch.zeros(1024 - 2 * len(near)))).to(DEVICE)
    out = torch.empty_like(near)

    _round_kernel[(1,)](near, out, 1024)

    assert torch.equal(out, near.to(torch.float8_e4m3fn).float())


def test_what_does_not_fit_is_refused():
    ring = new_ring(4, 4, 48, DEVICE, is_fp8=True, pinned=False)
    features, hidden = step(torch.Generator().manual_seed(0), 6)
    pack = capture_pack_triton.pack_kept_rows
    with pytest.raises(ValueError, match="6 rows of one step do not fit a ring of 4"):
        pack(features, hidden, ints(1, 1), ints(0, 0), ints(0, 1), ring)
    with pytest.raises(ValueError, match="3 rows do not divide among 2 requests"):
        pack(features[:3], hidden[:3], ints(1, 1), ints(0, 0), ints(0, 1), ring)
    with pytest.raises(ValueError, match=r"features must be \(4, 3, 48\) and hidden rows"):
        pack(features[:4, :2], hidden[:4], ints(1, 1), ints(0, 0), ints(0, 1), ring)
    with pytest.raises(ValueError, match=r"rows must be bfloat16, got torch.float32"):
        pack(features[:4].float(), hidden[:4], ints(1, 1), ints(0, 0), ints(0, 1), ring)
    with pytest.raises(ValueError, match="must be contiguous int32"):
        pack(features[:4], hidden[:4], ints(1, 1).long(), ints(0, 0), ints(0, 1), ring)
    with pytest.raises(ValueError, match=r"scales must be torch.float32 \(4, 4\)"):
        PackRing(ring.rows, ring.scales[:3], ring.lanes, ring.positions, ring.next_1)
    with pytest.raises(ValueError, match="fp8 rows need scales"):
        PackRing(ring.rows, None, ring.lanes, ring.positions, ring.next_1)


@pytest.mark.gpu
def test_a_gpu_quantises_as_a_cpu_does():
    largest = torch.arange(2**15).short().view(torch.bfloat16)  # 0 and all positive numbers
    largest = largest[largest.isfinite()]
    rows = largest[:, None] * torch.tensor([1, -0.37, 0.006]).bfloat16()

    for got, want in zip(quantise(rows.cuda()), quantise(rows), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("is_fp8", [True, False])
def test_a_captured_step_packs_what_changed(pinned, is_fp8):
    generator = torch.Generator().manual_seed(1)
    rings = [new_ring(500, 4, 4096, DEVICE, is_fp8, pinned=pinned) for _ in range(2)]
    features, hidden = step(generator, 320, 3, 4096)
    counts = torch.full((64,), 5, dtype=torch.int32, device=DEVICE)
    first, lanes = counts * 7, torch.arange(64, device=DEVICE).int()
    warm_up = new_ring(500, 4, 4096, DEVICE, is_fp8, pinned=pinned)
    capture_pack_triton.pack_kept_rows(features, hidden, counts, first, lanes, warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capture_pack_triton.pack_kept_rows(features, hidden, counts, first, lanes, rings[0])

    for _ in range(4):
        for t, other in zip((features, hidden), step(generator, 320, 3, 4096), strict=True):
            t.copy_(other)
        counts.copy_(torch.randint(0, 6, (64,), generator=generator).int())
        first += 11
        graph.replay()
        capture_pack.pack_kept_rows(features, hidden, counts, first, lanes, rings[1])
    torch.cuda.synchronize()

    got, want = rings
    assert got.next_1.item() == want.next_1.item() > 500
    for a, b in ((got.rows, want.rows), (got.lanes, want.lanes), (got.positions, want.positions)):
        assert torch.equal(bits(a), bits(b))
    assert got.scales is None or torch.equal(bits(got.scales), bits(want.scales))


def test_quantised_rows_are_close():
    rows = torch.randn(64, 256).bfloat16()
    packed, scales = quantise(rows)
    # Half a step of a 3-bit mantissa, 2^-4 of the entry, or half the smallest step, 2^-10.
    bound = (rows.float().abs() * 2**-4).maximum(scales[:, None] * 2**-10) * (1 + 1e-6)
    assert ((packed.float() * scales[:, None] - rows.float()).abs() <= bound).all()
