"""What a fast decoder offers to the session, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.plain.units import LayerUnits


class NotCovered(Exception):  # noqa: N818 - an answer, not an error: the plain path takes over.
    """Why an engine does not run a model or a call, as a clause that fits after "because"."""


@dataclass(frozen=True)
class Totals:
    """What units did since the prompt, summed over decode steps; arrays are `(rows, layers, kv_heads)`.

    Attributes:
        full_steps: int64: steps that ran full, keys-only refreshes included.
        keys_only_steps: int64: those of them that were keys-only refreshes.
        tokens_read: float64: what was read of the cache, in tokens: keys and values of one token count 1, keys alone
            one half.
        reasons: int64: how often wrappers overruled the policy, by reason.
    """

    full_steps: np.ndarray
    keys_only_steps: np.ndarray
    tokens_read: np.ndarray
    reasons: Mapping[str, np.ndarray]


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
    def begin(
        self, layers: Sequence[KvLayer], units: Sequence[LayerUnits], policy: StepPolicy, start: np.ndarray
    ) -> Decoding:
        """Start decoding after a prompt.

        Args:
            layers: The cache, with the prompt in it; the engine appends to it.
            units: What prefill left behind, layer by layer: the first sets.
            policy: Who decides.
            start: int64 `(rows,)`: place of each row's first token, after left padding.

        Raises:
            NotCovered: If the engine does not run this.
        """


def engine_for(model: PreTrainedModel) -> Engine:
    """The engine for a model's device.

    Raises:
        NotCovered: If there is none, or it does not run the model.
    """
    if model.device.type == "cpu":
        try:
            from recycler.decode.cpu.engine import CpuEngine
        except ImportError as error:
            raise NotCovered(f"the cpu engine needs numba, which is not installed ({error})") from error
        return CpuEngine(model)
    if model.device.type == "cuda":
        try:
            from recycler.decode.cuda.engine import CudaEngine
        except ImportError as error:
            raise NotCovered(f"the cuda engine needs triton, which is not installed ({error})") from error
        return CudaEngine(model)
    raise NotCovered(f"there is no engine for {model.device.type} yet")
