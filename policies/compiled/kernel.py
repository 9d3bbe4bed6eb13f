"""Kernels that are compiled once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import njit

from policies import program

# What all programs of policies are run by.
PROGRAM_SOURCES = (Path(program.__file__), *sorted(Path(__file__).parent.glob("*.py")))


def digest_of(sources: Iterable[Path]) -> str:
    """Of all that some kernels are made of, in the order given."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stamped_kernel(digest: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for a function that Python or kernels call: kept on disk while the digest of its sources stays.

    numba itself looks at the file of the function only, and would run old code after a change in what it calls.

    Args:
        digest: Of all sources of the kernel.
        options: Of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(error_model="numpy", cache=True, **options)(function)
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, digest)
        return compiled

    return decorate
