"""Triton's kernels against plain PyTorch in float64, forward and every gradient: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

import train_gpt

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    """Kernels compute for every tensor, on the CPU and in 32 bits too."""
    monkeypatch.setattr(train_gpt, "kernels_run", lambda _: True)


def test_kernels_run_on_nothing_that_a_cpu_holds():
    assert train_gpt.triton is not None
    assert not any(train_gpt.kernels_run(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))


def test_an_operator_enters_a_compiled_graph_whole():
    double = train_gpt.operator(torch.empty_like)(doubled)
    x = torch.arange(3.0)
    compiled = torch.compile(lambda x: double(x) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x + 1) and torch.equal(double(x), 2 * x)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(2 * x.numpy())  # what a trace could not look into
