"""The kernels of the CPU engine are compiled once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
