"""Runs before any test module is imported."""

import os
import sys
from pathlib import Path

# Before torch is imported, and for the processes that tests start: on tensors this small threads
# mostly wait for each other, for ever so long if another program has the other core.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    # Triton reads this when it meets a kernel: without a GPU the real kernels run interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote is NaN, so that an element a kernel forgets shows."""
    def poisoned(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x
        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
