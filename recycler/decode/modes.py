"""What a unit does in a walk over its layer's cache: one int8 per unit, the same numbers in all engines."""

from __future__ import annotations

# Nothing.
SKIP = 0
# Attend to the tokens of its set.
RECYCLED = 1
# Attend to the whole cache, and leave its logits behind.
FULL = 2
# Leave the logits of the whole cache behind; no values are read.
KEYS_ONLY = 3
