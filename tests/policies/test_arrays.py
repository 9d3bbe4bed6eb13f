from __future__ import annotations

import numpy as np
import torch

from policies.arrays import like, where


def test_where_takes_from_either_side_in_either_library() -> None:
    condition, yes, no = [True, False], [1.0, 2.0], [3.0, float("nan")]
    for library in (np.array, torch.tensor):
        taken = where(library(condition), library(yes), library(no))
        assert type(taken) is type(library(yes))
        np.testing.assert_array_equal(np.array(taken.tolist()), [1, np.nan])


def test_like_copies_numbers_into_library_and_dtype_of_the_reference() -> None:
    for reference in (np.zeros(1), np.zeros(1, np.float32), torch.zeros(1), torch.zeros(1, dtype=torch.float64)):
        copy = like(((1, 0.1),), reference)
        assert type(copy) is type(reference)
        assert copy.dtype == reference.dtype
        assert tuple(copy.shape) == (1, 2)
