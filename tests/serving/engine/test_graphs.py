"""What a captured program reads and writes stays where it was, whatever else the process does."""

from __future__ import annotations

import pytest
import torch

from serving.engine.cuda_graphs import Graphs


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
