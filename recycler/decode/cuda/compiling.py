"""Whoever waits for a GPU's kernels to be compiled is told for what."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from triton import knobs

_LOGGER = logging.getLogger("recycler")


@contextmanager
def told_of_compiling() -> Iterator[None]:
    """Say in one line, once per process, that a kernel was not yet compiled for what runs inside.

    What is only loaded is not worth a line.
    """
    others = knobs.compilation.listener

    def listener(**compiled: Any) -> None:
        if not compiled.get("cache_hit"):
            _tell_that_kernels_compile(knobs.cache.dir)
        if others is not None:
            others(**compiled)

    knobs.compilation.listener = listener
    try:
        yield
    finally:
        knobs.compilation.listener = others


@cache
def _tell_that_kernels_compile(folder: str) -> None:
    _LOGGER.warning(
        "compiling kernels for this GPU, once for a policy and a batch: the second token waits; they are kept in %s",
        folder,
    )
