"""Threads of kernels are those of torch, and torch keeps its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import recycler

PROGRAM = """
import sys
import numba, torch
from recycler.model.threads import threads_of_torch
torch.set_num_threads(int(sys.argv[1]))
print(*((threads_of_torch(), numba.get_num_threads(), torch.get_num_threads()) for _ in range(2)))
"""


@pytest.mark.parametrize(("n_torch", "n_kernels"), [(1, 1), (5, 3)])
def test_starting_the_threads_of_a_process_leaves_torch_with_those_that_it_was_given(
    n_torch: int, n_kernels: int
) -> None:
    # numba starts its threads once in a process, so each case needs a fresh one.
    environment = os.environ | {"NUMBA_NUM_THREADS": "3", "PYTHONPATH": str(Path(recycler.__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(n_torch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = (n_kernels, n_kernels, n_torch)
    assert done.stdout.strip() == f"{expected} {expected}"
