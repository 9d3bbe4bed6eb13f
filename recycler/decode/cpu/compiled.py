"""The kernels of the CPU engine are compiled once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch

from policies.compiled.kernel import PROGRAM_SOURCES, digest_of, stamped_kernel


def _digest_of_sources() -> str:
    """Of all that kernels are made of."""
    return digest_of((*sorted(Path(__file__).parent.glob("*.py")), *PROGRAM_SOURCES))


_SOURCES = _digest_of_sources()


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for a function that Python calls: kept on disk until any source of the kernels changes.

    Args:
        options: Of `numba.njit`.
    """
    return stamped_kernel(_SOURCES, **options)


def threads_of_torch() -> int:
    """Let kernels use as many threads as torch does, as far as numba has them, and return how many that is.

    How a sum is split over threads decides how it is rounded, so equal runs need equal numbers of them.
    """
    n_torch = torch.get_num_threads()
    n_threads = min(n_torch, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(n_threads)
    if torch.get_num_threads() != n_torch:
        # The first call in a process starts numba's threads, which sets OpenMP's number of them to all processors.
        # torch takes its own from there, and would read the next prompt with other roundings than the one before.
        torch.set_num_threads(n_torch)
    return n_threads
