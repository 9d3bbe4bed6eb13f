"""What `recycler.fidelity.baselines` was in 0.1."""

from __future__ import annotations

import warnings
from typing import NoReturn

from recycler.evaluate.baselines import (
    CHECKS_EVERY,
    OUR_SET,
    PUBLISHED_THRESHOLD,
    SFI_MAX_AGE,
    STRIDES,
    baselines,
    h2o_set,
    refreshkv_set,
    schedules,
    snapkv_set,
    streaming_llm_set,
    tova_set,
)

__all__ = [
    "CHECKS_EVERY",
    "OUR_SET",
    "PUBLISHED_THRESHOLD",
    "SFI_MAX_AGE",
    "STRIDES",
    "baselines",
    "h2o_set",
    "refreshkv_set",
    "schedules",
    "snapkv_set",
    "streaming_llm_set",
    "tova_set",
]

warnings.warn(
    "recycler.fidelity.baselines is now recycler.evaluate.baselines; the old path goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)


def __getattr__(name: str) -> NoReturn:
    if name == "dynamic_name":
        raise ImportError(f"{__name__}.{name} is gone: use the name of a recycler.evaluate.baselines.DynamicSchedule.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
