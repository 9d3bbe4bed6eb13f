"""What `recycler.engine_run` was in 0.1."""

from __future__ import annotations

import warnings

from recycler.decode.cache_watch import CACHE_CHANGED, other_padding
from recycler.decode.engine_run import EngineRun
from recycler.decode.forward_call import ForwardCall

__all__ = ["CACHE_CHANGED", "EngineRun", "ForwardCall", "other_padding"]

warnings.warn(
    "recycler.engine_run is now recycler.decode.engine_run (CACHE_CHANGED, other_padding: recycler.decode.cache_watch, "
    "ForwardCall: recycler.decode.forward_call); the old path goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
