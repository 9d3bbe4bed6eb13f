"""What `recycler.size_losses` was in 0.1."""

from __future__ import annotations

import warnings

from recycler.record.size_losses import measure_size_losses, set_sizes

__all__ = ["measure_size_losses", "set_sizes"]

warnings.warn(
    "recycler.size_losses is now recycler.record.size_losses; the old path goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
