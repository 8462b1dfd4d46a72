"""Blockwise distillation, in torch and in kernels, equals its plain definition in loss and
gradients, and its memory is bounded by a few blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specops import device, distill_triton
from specops.distill import (
    BLOCKS,
    FrozenHead,
    Rows,
    Teacher,
    distill,
    judge_,
    label_figures,
    overlap,
    row_loss,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = torch.float64
KINDS = ["lk", "forward_kl", "total_variation", "reverse_kl"]
IMPLEMENTATIONS = [
    pytest.param(BLOCKS, WIDE, id="definition"),
    pytest.param(distill_triton.BLOCKS, torch.float32, id="kernel"),
]
# Kernels sum a few hundred terms of size 1 in float32, each with an error of 2^-24.
TOLERANCE = {WIDE: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-6}}


class Case:
    """Random student and teacher rows; V and D exceed a block of 128."""

    def __init__(
        self,
        reduced: bool,
        softcap: float | None = None,
        cool: bool = False,
        shared: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.generator = torch.Generator().manual_seed(4)
        N, R, H, V = 11, 7 if shared else 11, 6, 300
        D = 140 if reduced else V
        ids = torch.randperm(V, generator=self.generator)[:D].sort().values
        row = torch.randint(
            0, R - 1, (N,), generator=self.generator
        )  # nobody imitates the last one
        self.hidden, self.weight = self.random(N, H, dtype=dtype), self.random(D, H, dtype=dtype)
        self.teacher = Teacher(
            self.random(R, H + 2, dtype=dtype),
            FrozenHead(self.random(V, H + 2, dtype=dtype), softcap),
            ids.to(DEVICE) if reduced else None,
            (0.5 + torch.rand(R, generator=self.generator)).to(DEVICE) if cool else None,
        )
        self.rows = Rows(
            torch.randint(0, D, (N,), generator=self.generator).to(DEVICE),
            (torch.rand(N, generator=self.generator) < 0.7).to(DEVICE),
            row.to(DEVICE) if shared else None,
        )
        self.weights = torch.rand(N, generator=self.generator).to(DEVICE)

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, dtype)

    def leaves(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        return hidden, weight

    def teacher_in(self, dtype: torch.dtype) -> Teacher:
        head = FrozenHead(self.teacher.head.weight_VH.to(dtype), self.teacher.head.softcap)
        return replace(self.teacher, hidden_RH=self.teacher.hidden_RH.to(dtype), head=head)

    def target_probs(self) -> torch.Tensor:
        """[N, D] float64, computed directly as documented."""
        teacher = self.teacher_in(WIDE)
        scores = teacher.head.logits(teacher.hidden_RH)
        if teacher.temperature_R is not None:
            scores = scores / teacher.temperature_R[:, None]
        probs = scores.softmax(-1)
        probs = probs if teacher.ids_D is None else probs[:, teacher.ids_D]
        return probs if self.rows.teacher_row_N is None else probs[self.rows.teacher_row_N]


def check(case, blocks, dtype, kind, chunk_rows=4):
    """Compare loss, row results and gradients with autograd over the definition in float64."""
    hidden, weight = case.leaves(WIDE)
    logits, probs = hidden @ weight.T, case.target_probs()
    losses = row_loss(kind, probs, logits)
    total = (losses * case.weights).sum()
    want = torch.autograd.grad(3 * total, (hidden, weight))

    own_hidden, own_weight = case.leaves(dtype)
    found = distill(
        own_hidden, own_weight, case.teacher_in(dtype), case.rows,
        case.weights, kind, chunk_rows, blocks,
    )  # fmt: skip
    slopes = torch.autograd.grad(3 * found.loss, (own_hidden, own_weight))

    near = TOLERANCE[dtype]
    own = logits.softmax(-1).gather(1, case.rows.label_ids_N[:, None])[:, 0]
    agrees = logits.argmax(-1) == case.rows.label_ids_N
    torch.testing.assert_close(found.loss.to(WIDE), total, **near)
    torch.testing.assert_close(found.figures.loss_N.to(WIDE), losses, **near)
    torch.testing.assert_close(found.figures.alpha_N.to(WIDE), overlap(probs, logits), **near)
    torch.testing.assert_close(
        found.figures.label_prob_N.to(WIDE), own * case.rows.label_known_N, **near
    )
    assert found.figures.agrees_N.equal(agrees & case.rows.label_known_N)
    for slope, expected in zip(slopes, want, strict=True):
        torch.testing.assert_close(slope.to(WIDE), expected, **near)


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks per row of 300, as with a real vocabulary; GPU tests keep the real size."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(distill_triton, "_BLOCK", 128)
        monkeypatch.setattr(distill_triton, "_NUM_WARPS", 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True], ids=["whole vocabulary", "reduced"])
@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
def test_loss_and_gradients_are_those_of_the_plain_definition(blocks, dtype, reduced, kind):
    check(Case(reduced), blocks, dtype, kind)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("cool", [False, True], ids=["temperature 1", "temperatures"])
@pytest.mark.parametrize("shared", [False, True], ids=["own teacher rows", "shared ones"])
@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
def test_any_teacher_is_followed(blocks, dtype, shared, cool, softcap):
    check(Case(True, softcap, cool, shared), blocks, dtype, "lk", chunk_rows=3)


@pytest.mark.parametrize("chunk_rows", [1, 5, 11, 100])
def test_the_size_of_a_block_changes_nothing(chunk_rows):
    check(Case(True, shared=True), BLOCKS, WIDE, "lk", chunk_rows)
    check(Case(False), BLOCKS, WIDE, "lk", chunk_rows)


def forgets_the_mass(scores, target, rows, weights, kind):
    """KL pulled towards p and not p': right for a whole vocabulary."""
    return judge_(
        scores, target._replace(mass_R=torch.ones_like(target.mass_R)), rows, weights, kind
    )


def forgets_the_mean(scores, target, rows, weights, kind):
    """TV's gradient without E_q[m]: its rows do not sum to zero."""
    logits = scores.clone()
    found = judge_(scores, target, rows, weights, kind)
    q = logits.softmax(-1)
    m = (q < target.probs_RD).to(q.dtype)
    scores -= (
        weights[:, None].to(q.dtype)
        * (1 - torch.exp(-3 * found.alpha_N))[:, None]
        * (q * (q * m).sum(-1, keepdim=True))
    )
    return found


@pytest.mark.parametrize("wrong", [forgets_the_mass, forgets_the_mean])
def test_a_wrong_gradient_is_noticed(wrong):
    with pytest.raises(AssertionError):
        check(Case(True), BLOCKS._replace(judge_=wrong), WIDE, "lk")


@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
def test_without_gradients_the_figures_are_the_same(blocks, dtype):
    case = Case(True, shared=True)
    hidden, weight = case.leaves(dtype)
    given = (case.teacher_in(dtype), case.rows, case.weights, "lk", 4, blocks)

    found = distill(hidden, weight, *given)
    with torch.no_grad():
        alone = distill(hidden, weight, *given)

    assert found.loss.requires_grad and not alone.loss.requires_grad
    for left, right in zip(found.figures, alone.figures, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
def test_figures_of_labels_need_no_teacher(blocks, dtype):
    case = Case(True)
    hidden, weight = case.leaves(dtype)

    found = label_figures(hidden, weight, case.rows, 4, blocks)

    whole = distill(
        hidden, weight, case.teacher_in(dtype), case.rows, case.weights, "lk", 4, blocks
    ).figures
    torch.testing.assert_close(found.label_prob_N, whole.label_prob_N)
    assert found.agrees_N.equal(whole.agrees_N)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_a_drafter_whose_logits_are_nan_overlaps_with_nothing(blocks, dtype, kind):
    case = Case(reduced=False)
    hidden, weight = case.leaves(dtype)
    given = weight, case.teacher_in(dtype), case.rows, case.weights, kind, 4, blocks
    sound = distill(hidden, *given).figures
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    broken = distill(hidden, *given).figures
    labels = label_figures(hidden, weight, case.rows, 4, blocks)

    others = torch.arange(len(hidden), device=DEVICE) != 3
    assert broken.alpha_N[3].isnan() and broken.loss_N[3].isnan()
    assert not broken.agrees_N[3] and not labels.agrees_N[3]
    assert broken.alpha_N[others].equal(sound.alpha_N[others])
    assert broken.loss_N[others].equal(sound.loss_N[others])


def test_only_one_gradient_may_be_wanted():
    case = Case(True)
    hidden, weight = case.leaves(WIDE)
    given = (case.teacher_in(WIDE), case.rows, case.weights, "lk", 4)
    both = torch.autograd.grad(device.distill(hidden, weight, *given).loss, (hidden, weight))

    (left,) = torch.autograd.grad(device.distill(hidden, weight.detach(), *given).loss, hidden)
    (right,) = torch.autograd.grad(device.distill(hidden.detach(), weight, *given).loss, weight)

    assert left.equal(both[0]) and right.equal(both[1])


def test_gradients_are_given_away_uncopied_and_once():
    case = Case(True)
    hidden, weight = case.leaves(WIDE)
    loss = device.distill(hidden, weight, case.teacher_in(WIDE), case.rows, case.weights, "lk").loss
    places = [ctx_grad.data_ptr() for ctx_grad in loss.grad_fn.grads]

    loss.backward(retain_graph=True)

    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == places
    with pytest.raises(RuntimeError, match="handed over by an earlier backward pass"):
        loss.backward()


@pytest.mark.parametrize(("blocks", "dtype"), IMPLEMENTATIONS)
def test_a_float32_weight_beside_bfloat16_rows_has_a_float32_gradient(blocks, dtype):
    case = Case(True)
    want_hidden, want_weight = case.leaves(torch.float32)
    hidden = case.hidden.bfloat16().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    rest = (case.rows, case.weights, "lk", 4, blocks)

    distill(want_hidden, want_weight, case.teacher, *rest).loss.backward()
    distill(hidden, weight, case.teacher_in(torch.bfloat16), *rest).loss.backward()

    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    for slope, expected in ((weight.grad, want_weight.grad), (hidden.grad, want_hidden.grad)):
        error = (slope.float() - expected).norm() / expected.norm()
        assert error < 0.05  # logits of up to 10 are rounded by 2^-8 of their size


def test_no_rows_have_no_loss():
    case = Case(True)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    hidden, weight = (
        torch.zeros(0, 6, device=DEVICE).requires_grad_(),
        case.leaves(torch.float32)[1],
    )

    found = device.distill(
        hidden, weight, case.teacher, Rows(none, none.bool(), none), none.float(), "lk"
    )
    found.loss.backward()

    assert float(found.loss.detach()) == 0
    assert not weight.grad.any()


def test_shapes_that_do_not_fit_are_refused():
    case = Case(True)
    hidden, weight = case.leaves(torch.float32)

    with pytest.raises(ValueError, match=r"student's head must be \[140, 6\], got \(139, 6\)"):
        device.distill(hidden, weight[1:], case.teacher, case.rows, case.weights, "lk")
    with pytest.raises(ValueError, match=r"10 student rows need as many teacher rows"):
        device.distill(
            hidden[1:], weight, case.teacher, case.rows.part(slice(1, None)), case.weights[1:], "lk"
        )
    with pytest.raises(ValueError, match=r"weights_N must be \[11\], got \(10,\)"):
        device.distill(hidden, weight, case.teacher, case.rows, case.weights[1:], "lk")


def large(num_rows: int, width: int, vocab: int, reduced: int, scale: float) -> tuple:
    """bfloat16 inputs of ``distill`` on the GPU."""
    made = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(num_rows, width, **made).requires_grad_()
    weight = (torch.randn(reduced, width, **made) * scale).requires_grad_()
    ids = torch.randperm(vocab, device="cuda")[:reduced].sort().values
    teacher = Teacher(
        hidden.detach() + torch.randn(num_rows, width, **made),
        FrozenHead(torch.randn(vocab, width, **made) * scale),
        None if reduced == vocab else ids,
    )
    labels = torch.randint(0, reduced, (num_rows,), device="cuda")
    rows = Rows(labels, torch.rand(num_rows, device="cuda") < 0.9)
    return hidden, weight, teacher, rows, torch.rand(num_rows, device="cuda") / num_rows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [151_936, 32_000])
def test_kernels_equal_the_definition_at_full_size(reduced, kind):
    torch.manual_seed(0)
    hidden, weight, *rest = large(700, 512, 151_936, reduced, 0.1)

    left = distill(hidden, weight, *rest, kind, 256, distill_triton.BLOCKS)
    slopes = torch.autograd.grad(left.loss, (hidden, weight))
    right = distill(hidden, weight, *rest, kind, 256, BLOCKS)
    want = torch.autograd.grad(right.loss, (hidden, weight))

    for name, a, b in zip(left.figures._fields, left.figures, right.figures, strict=True):
        if a.dtype == torch.bool:
            assert a.equal(b), name
        else:  # 150,000 float32 terms, summed in a different order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for slope, expected in zip(slopes, want, strict=True):
        # Both round the logits' float32 gradients to bfloat16; few come out differently.
        assert (slope - expected).float().norm() < 5e-3 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lk"])
@pytest.mark.parametrize("reduced", [151_936, 32_000])
def test_at_most_1200_megabytes_beyond_inputs_and_gradients(reduced, kind):
    hidden, weight, *rest = large(8192, 4096, 151_936, reduced, 0.02)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    device.distill(hidden, weight, *rest, kind).loss.backward()

    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.2e9
    assert torch.isfinite(hidden.grad).all() and hidden.grad.any()
