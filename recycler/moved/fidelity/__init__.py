"""What `recycler.fidelity` was in 0.1."""

from __future__ import annotations

import warnings
from typing import NoReturn

from recycler.evaluate import Method, Outcome, PromptOutcome, Scheduled, baselines

__all__ = ["Method", "Outcome", "PromptOutcome", "Scheduled", "baselines"]

_AT_EVERY_STEP = "a method that chooses at every step is a recycler.evaluate.Method with a `begin` of its own"
_GONE = {
    "Chosen": _AT_EVERY_STEP,
    "EveryStep": _AT_EVERY_STEP,
    "FreshTopK": "use recycler.evaluate.baselines.fresh_top_k",
    "Quest": "recycler.evaluate.Quest is a method by itself, with a name and a source before its k",
    "TokenSelector": _AT_EVERY_STEP,
}

warnings.warn("recycler.fidelity is now recycler.evaluate; the old path goes in 0.3.", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> NoReturn:
    if name in _GONE:
        raise ImportError(f"recycler.fidelity.{name} is gone: {_GONE[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
