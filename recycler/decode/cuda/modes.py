"""What a unit does in a walk over the cache, as the kernels keep it: one int8 per unit."""

from __future__ import annotations

import triton.language as tl

# Nothing.
SKIP = tl.constexpr(0)
# Attend to the tokens of its set.
RECYCLED = tl.constexpr(1)
# Attend to the whole cache, and leave its logits behind.
FULL = tl.constexpr(2)
# Leave the logits of the whole cache behind; no values are read.
KEYS_ONLY = tl.constexpr(3)
