"""Threads of compiled kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

# Kernels of all requests share one pool of threads, which some of numba's threading layers let one caller use only.
_POOL = threading.RLock()


@contextmanager
def kernel_threads() -> Iterator[int]:
    """Have the threads of kernels alone in this process; yields how many there are, see `threads_of_torch`."""
    with _POOL:
        yield threads_of_torch()


def threads_of_torch() -> int:
    """Let kernels use as many threads as torch does, as far as numba has them, and return how many that is.

    How a sum is split over threads decides how it is rounded, so equal runs need equal numbers of them.
    """
    n_torch = torch.get_num_threads()
    n_threads = min(n_torch, int(numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(n_threads)
    if torch.get_num_threads() != n_torch:
        # The first call in a process starts numba's threads, which sets OpenMP's number of them to all processors.
        # torch takes its own from there, and would read the next prompt with other roundings than the one before.
        torch.set_num_threads(n_torch)
    return n_threads
