"""Before any test: without a GPU, Triton's kernels run in its interpreter, on NumPy."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton looks at it when a kernel is defined, its own library's included: before anybody imports it.
    os.environ["TRITON_INTERPRET"] = "1"
