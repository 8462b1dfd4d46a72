"""What a captured program reads and writes stays where it was, whatever else the process does."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from serving.engine.cuda_graphs import Graphs
from specops.best_ids_triton import _best_of_part, _join_best, best_ids
from specops.compiling import Kernels


@pytest.mark.gpu
def test_a_program_does_not_use_memory_that_others_may_give_back():
    """The library's workspace: products whose inputs are split among programs meet there."""
    torch.manual_seed(0)
    x, weight = (torch.randn(64, 65_536, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
    graphs = Graphs(torch.device("cuda"))
    torch._C._cuda_clearCublasWorkspaces()  # of tests before
    torch.cuda.empty_cache()
    with torch.inference_mode():
        before = torch.cuda.memory_reserved()
        program = graphs.capture(lambda: torch.mm(x, weight.t(), out=out))
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - before
        out.zero_()
        program()
        torch.cuda.synchronize()

    wanted = x.double() @ weight.double().t()
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=4.0)
    assert held > 0, "the workspace lies in the memory of the graphs"


@pytest.mark.gpu
def test_programs_that_have_never_run_compute_the_same(tmp_path, monkeypatch):
    """Kernels of ours and of cuBLAS, in shapes that this process has not used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    weight = torch.randn(3_000, 1_024, device="cuda").bfloat16()
    inputs = [torch.randn(rows, 1_024, device="cuda").bfloat16() for rows in (37, 3)]
    outs = [torch.zeros(len(x), dtype=torch.int64, device="cuda") for x in inputs]

    def work(at):
        outs[at].copy_(best_ids(torch.nn.functional.linear(inputs[at], weight)))

    for _ in ("first start", "second start"):
        for kernel in (_best_of_part, _join_best):
            kernel.device_caches.clear()
        graphs = Graphs(torch.device("cuda"))
        with torch.inference_mode():
            works = [partial(work, at) for at in range(len(inputs))]
            graphs.captures.begin(Kernels(num_workers=2), works, tmp_path / "kernels.json")
            programs = [graphs.capture(one) for one in works]
            graphs.captures.end()
            graphs.captures.keep_list(tmp_path / "kernels.json")
            for out in outs:
                out.fill_(-1)
            for program in programs:
                program()
        torch.cuda.synchronize()

        assert graphs.captures.spent.first_runs_s == 0, "none was run before it was captured"
        for x, out in zip(inputs, outs, strict=True):
            assert torch.equal(out, torch.nn.functional.linear(x, weight).argmax(-1))


@pytest.mark.gpu
def test_the_thread_that_serves_makes_programs_later(caplog):
    """It has not used cuBLAS yet, which allocates a handle for each thread."""
    weight, x = (torch.randn(96, 96, device="cuda").bfloat16() for _ in range(2))
    out = torch.zeros_like(x)

    def work():
        torch.mm(x, weight, out=out)

    graphs = Graphs(torch.device("cuda"))
    graphs.captures.begin(Kernels(num_workers=0), [work])
    first = graphs.capture(work)
    graphs.captures.end()
    made = []

    def make():
        graphs.will_serve()
        made.append(graphs.capture(work))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    for program in (first, *made):
        out.zero_()
        program()
        torch.cuda.synchronize()
        torch.testing.assert_close(out, x @ weight)
    assert len(made) == 1 and not caplog.text


@pytest.mark.gpu
def test_a_program_that_cannot_be_captured_unrun_is_run_first(caplog):
    """It asks the device for a value, as long as it has not run."""
    x, out = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    was_run = []

    def work():
        if not was_run and not torch.cuda.is_current_stream_capturing():
            was_run.append(True)
        if not was_run:
            x.sum().item()
        out.copy_(x * 3)

    graphs = Graphs(torch.device("cuda"))
    with torch.inference_mode():
        graphs.captures.begin(Kernels(num_workers=0), [work])
        program = graphs.capture(work)
        graphs.captures.end()
        other = graphs.capture(lambda: out.mul_(2))
        out.zero_()
        program()
        other()
    torch.cuda.synchronize()

    assert "before it has run; each program is run before it is captured" in caplog.text
    assert out.tolist() == [6.0] * 8
    kept = torch.empty(1 << 20, device="cuda")
    assert kept.untyped_storage().nbytes() == 4 << 20, "memory is allocated as before"
