"""Runs before any test module is imported."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    # Triton reads this when it meets a kernel: without a GPU the real kernels run interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
