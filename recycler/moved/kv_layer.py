"""What `recycler.kv_layer` was in 0.1."""

from __future__ import annotations

import warnings

from recycler.decode.cache import GrowingTokens, KvLayer, growing_layers

__all__ = ["GrowingTokens", "KvLayer", "growing_layers"]

warnings.warn(
    "recycler.kv_layer is now recycler.decode.cache; the old path goes in 0.3.", DeprecationWarning, stacklevel=2
)
