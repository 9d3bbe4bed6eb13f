"""What `recycler.engine` was in 0.1."""

from __future__ import annotations

import warnings

from recycler.decode.counts import Totals
from recycler.decode.engine import Decoding, Engine
from recycler.decode.engines import engine_for
from recycler.model.decoder_parts import NotCovered

__all__ = ["Decoding", "Engine", "NotCovered", "Totals", "engine_for"]

warnings.warn(
    "recycler.engine is now recycler.decode.engine (engine_for: recycler.decode.engines, NotCovered: "
    "recycler.model.decoder_parts, Totals: recycler.decode.counts); the old path goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
