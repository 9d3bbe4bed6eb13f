"""Methods that choose anew at every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class Chosen(NamedTuple):
    """What a layer of one row attends to at a step.

    Attributes:
        allowed: bool `(kv_heads, group, tokens)`.
        tokens_read: float64 `(kv_heads,)`: what choosing and attending read of the cache, in tokens: keys and values of
            one token count 1, keys alone one half.
    """

    allowed: Tensor
    tokens_read: Tensor


class TokenSelector(ABC):
    """Chooses what to attend to by the query of the step itself, so that there is nothing to refresh.

    A selector is a frozen dataclass of numbers.
    """

    @abstractmethod
    def choose(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> Chosen:
        """Choose for one layer of one row.

        Args:
            layer: Index of the layer.
            query: `(kv_heads, group, head_dim)`.
            key: `(kv_heads, tokens, head_dim)`, the whole cache, the newest token last.
            scaling: Factor on query x key.
        """
