"""What a decoder offers, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import Totals
from recycler.decode.first_sets import FirstSets


class Decoding(ABC):
    """One run of decode steps after a prompt, on an engine.

    What it tells of the last step may be fetched from a device when it is asked for, and then takes time.
    """

    @property
    @abstractmethod
    def full(self) -> np.ndarray:
        """bool `(rows, layers, kv_heads)`: decisions of the last step."""

    @property
    @abstractmethod
    def keys_only(self) -> np.ndarray:
        """bool of the same shape: those of them that were keys-only refreshes."""

    @property
    @abstractmethod
    def tokens_read(self) -> np.ndarray:
        """float64 of the same shape: what each unit read of the cache at the last step, as `Totals` counts it."""

    @abstractmethod
    def totals(self) -> Totals:
        """What was done since the prompt."""

    @abstractmethod
    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Decode one token per row.

        Args:
            tokens: int64 `(rows,)`.
            places: int64 `(rows,)` or `(1,)`: their positions, as rotary embedding counts them.

        Returns:
            Logits `(rows, vocabulary)`, a new tensor in the model's type or a wider one.
        """


class Engine(ABC):
    """A decoder for one model.

    Building one raises `NotCovered` if it does not run the model.
    """

    name: str

    @abstractmethod
    def begin(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> Decoding:
        """Start decoding after a prompt.

        Args:
            layers: The cache, with the prompt in it; the engine appends to it.
            first: What the prompt left behind.
            policy: Who decides.

        Raises:
            NotCovered: If the engine does not run this.
        """
