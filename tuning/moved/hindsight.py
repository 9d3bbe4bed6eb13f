"""What `tuning.hindsight` was in 0.1."""

from __future__ import annotations

import warnings

from tuning.divide.hindsight import hindsight

__all__ = ["hindsight"]

warnings.warn(
    "tuning.hindsight is now tuning.divide.hindsight; the old path goes in 0.3.", DeprecationWarning, stacklevel=2
)
