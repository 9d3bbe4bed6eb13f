"""A layer of a transformers cache that grows in place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Room is made for so many tokens, or for this part of those there are: at most a fortieth of a long cache is empty, and
# the copies that growth takes are at most 40 tokens per step.
_LEAST_ROOM_TOKENS = 64
_ROOM_PART = 40


@dataclass
class GrowingTokens:
    """Keys or values: a prompt's, as they came, and the tokens since, with room for more.

    Attributes:
        prompt: `(prompts, kv_heads, tokens, head_dim)`, which rows share in turn: row i has prompt i modulo their
            number; never copied.
        own: `(rows, kv_heads, room, head_dim)`; zeros where there are none yet: masked attention times a NaN is a NaN.
        n_own: Tokens in `own`.
    """

    prompt: Tensor
    own: Tensor
    n_own: int = 0

    @classmethod
    def after(cls, prompt: Tensor, rows: int | None = None) -> GrowingTokens:
        """Tokens that grow from a prompt, which `rows` rows share (None: as many rows as it has)."""
        prompt = prompt.contiguous()
        own_rows = prompt.shape[0] if rows is None else rows
        room = _more_room_tokens(prompt.shape[2])
        return cls(prompt, prompt.new_zeros((own_rows, prompt.shape[1], room, prompt.shape[3])))

    @property
    def n_tokens(self) -> int:
        return self.prompt.shape[2] + self.n_own

    def make_room(self, n_own: int | None = None) -> bool:
        """Make more room if it is used up; the only time that tokens are copied. True if it was.

        Args:
            n_own: Own tokens that there must be room for; None for one more than there are.
        """
        wanted = self.n_own + 1 if n_own is None else n_own
        rows, kv_heads, room, head_dim = self.own.shape
        if wanted <= room:
            return False
        more = max(wanted - room, _more_room_tokens(self.n_tokens))
        larger = self.own.new_zeros((rows, kv_heads, room + more, head_dim))
        larger[:, :, :room] = self.own
        self.own = larger
        return True

    def append(self, token: Tensor) -> None:
        """Add one token to every row, `(rows, kv_heads, 1, head_dim)`."""
        self.make_room()
        self.own[:, :, self.n_own] = token[:, :, 0]
        self.n_own += 1

    def put(self, tokens: Tensor, rows: Tensor, places: Tensor) -> None:
        """Write n tokens, `(n, kv_heads, head_dim)`, to own places of rows; those that were there are lost."""
        self.make_room(int(places.max()) + 1)
        self.own[rows, :, places] = tokens

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """All tokens where they lie: the prompt's, and the rows' own."""
        return self.prompt, self.own[:, :, : self.n_own]

    def joined(self) -> Tensor:
        """All tokens as one tensor; a copy unless there is only the prompt."""
        if self.n_own == 0:
            return self.prompt
        prompt = of_rows(self.prompt, self.own.shape[0])
        return torch.cat([prompt, self.own[:, :, : self.n_own]], dim=2)


def of_rows(prompt: Tensor, rows: int) -> Tensor:
    """The prompt of each of some rows, `(prompts, ...)` to `(rows, ...)`; a copy where several prompts are shared."""
    return prompt.expand(rows, *prompt.shape[1:]) if len(prompt) == 1 else prompt.repeat(rows // len(prompt), 1, 1, 1)


def _more_room_tokens(n_tokens: int) -> int:
    return max(_LEAST_ROOM_TOKENS, n_tokens // _ROOM_PART)


class KvLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that an engine appends to without copying what is there.

    To transformers it is the layer that it replaces: `keys` and `values` are there whenever somebody asks, at the price
    of a copy, and may be set.

    Attributes:
        key: Where keys are.
        value: Where values are.
        revision: Grows whenever somebody else sets keys or values.
    """

    def __init__(self, key: GrowingTokens, value: GrowingTokens) -> None:
        self.key: GrowingTokens | None = key
        self.value: GrowingTokens | None = value
        self.revision = 0
        # What somebody set that holds no tokens: None, or the empty tensor that transformers starts a layer with.
        self._no_keys: Tensor | None = None
        self._no_values: Tensor | None = None
        self.is_initialized = True
        self.dtype, self.device = key.prompt.dtype, key.prompt.device

    @property
    def keys(self) -> Tensor | None:
        return self._no_keys if self.key is None else self.key.joined()

    @keys.setter
    def keys(self, tokens: Tensor | None) -> None:
        self.revision += 1
        self.key = _after(tokens)
        self._no_keys = tokens if self.key is None else None

    @property
    def values(self) -> Tensor | None:
        return self._no_values if self.value is None else self.value.joined()

    @values.setter
    def values(self, tokens: Tensor | None) -> None:
        self.revision += 1
        self.value = _after(tokens)
        self._no_values = tokens if self.value is None else None

    @property
    def parts(self) -> tuple[GrowingTokens, GrowingTokens]:
        """Keys and values of a layer that holds some.

        Raises:
            ValueError: If somebody has emptied it.
        """
        if self.key is None or self.value is None:
            raise ValueError("the KV cache was emptied between two decode steps.")
        return self.key, self.value

    def reset(self) -> None:
        """Drop all tokens, as a `DynamicLayer` does; before transformers 5.23 it left zeros in their places."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def get_seq_length(self) -> int:
        return 0 if self.key is None else self.key.n_tokens


def growing_layers(cache: DynamicCache, indices: Collection[int] | None = None) -> list[KvLayer]:
    """Replace a cache's layers, or some of them, by ones that grow in place, and return them.

    Raises:
        TypeError: If one of them is of another kind than a plain `DynamicLayer`, or holds no tokens; nothing is
            replaced then.
    """
    chosen = range(len(cache.layers)) if indices is None else sorted(indices)
    layers = [cache.layers[index] if index < len(cache.layers) else None for index in chosen]
    for layer in layers:
        if type(layer) not in (DynamicLayer, KvLayer):
            raise TypeError(type(layer).__name__)
        if type(layer) is DynamicLayer and getattr(layer, "keys", None) is None:
            raise TypeError("layer without tokens")
    grown = [layer if isinstance(layer, KvLayer) else _grown(layer) for layer in layers]
    for index, layer in zip(chosen, grown, strict=True):
        cache.layers[index] = layer
    return grown


def _after(tokens: Tensor | None) -> GrowingTokens | None:
    return None if tokens is None or tokens.dim() < 4 else GrowingTokens.after(tokens)


def _grown(layer: Any) -> KvLayer:
    return KvLayer(GrowingTokens.after(layer.keys), GrowingTokens.after(layer.values))
