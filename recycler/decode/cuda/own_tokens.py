"""Where the cache keeps the tokens since the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from recycler.decode.cache import KvLayer


class OwnTokens:
    """Tells kernels where the tokens since the prompt are: they move when the cache grows, and a captured graph stays.

    Args:
        layers: Of the cache; all have room for as many tokens.
        device: Where they are.

    Attributes:
        addresses: int64 `(layers, 2)`: of keys and values.
        room: int32 `(1,)`: tokens of a row that there is room for.
    """

    def __init__(self, layers: Sequence[KvLayer], device: torch.device) -> None:
        self.addresses = torch.zeros((len(layers), 2), dtype=torch.int64, device=device)
        self.room = torch.zeros(1, dtype=torch.int32, device=device)
        self.look(layers)

    def look(self, layers: Sequence[KvLayer]) -> None:
        """See where they are now."""
        self.addresses.copy_(torch.tensor([[part.own.data_ptr() for part in layer.parts] for layer in layers]))
        self.room.fill_(layers[0].parts[0].own.shape[2])


@triton.jit
def own_tokens(addresses, element: tl.constexpr):
    """Pointers to the keys and values of a layer, from its row of `OwnTokens.addresses`."""
    pointer: tl.constexpr = tl.pointer_type(element)
    # torch allocates memory at multiples of 512 bytes; copies of 16 bytes depend on it.
    key = tl.multiple_of(tl.load(addresses).to(pointer), 16)
    value = tl.multiple_of(tl.load(addresses + 1).to(pointer), 16)
    return key, value
