"""The two array operations that NumPy and torch spell differently.

Policies import neither library for their decisions: whatever array comes in, the same expression runs on it. torch is
not imported here; its tensors are recognised by what they can do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A numpy.ndarray or a torch.Tensor. Policies mix neither: one decision sees one kind.
Array = Any


def where(condition: Array, yes: Array, no: Array) -> Array:
    """Take `yes` where `condition` holds and `no` elsewhere, in the library of `condition`."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes.where(condition, no)


def like(values: Any, reference: Array) -> Array:
    """Copy plain numbers into the library, dtype and device of `reference`."""
    if isinstance(reference, np.ndarray):
        return np.asarray(values, dtype=reference.dtype)
    return reference.new_tensor(values)
