"""Kernels that are compiled once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from policies import program


def _digest_of_sources() -> str:
    """Of all that kernels are made of."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(program.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest_of_sources()


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for a function that Python calls: kept on disk until any source of the kernels changes.

    numba itself looks at the file of the function only, and would run old code after a change in what it calls.

    Args:
        options: Of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(error_model="numpy", cache=True, **options)(function)
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _SOURCES)
        return compiled

    return decorate
