"""What a fast decoder offers to the session, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from policies import StepPolicy
from recycler.kv_layer import KvLayer
from recycler.units import LayerUnits


class NotCovered(Exception):  # noqa: N818 - an answer, not an error: the plain path takes over.
    """Why an engine does not run a model or a call, as a clause that fits after "because"."""


class Decoding(ABC):
    """One run of decode steps after a prompt, on an engine.

    Attributes:
        full: bool `(rows, layers, kv_heads)`: decisions of the last step.
        keys_only: bool of the same shape: those of them that were keys-only refreshes.
        tokens_read: float64 of the same shape: what each unit read of the cache at the last step, in tokens: keys and
            values of one token count 1, keys alone one half.
        reasons: What wrappers overruled at the last step, bool of the same shape, by reason.
    """

    full: np.ndarray
    keys_only: np.ndarray
    tokens_read: np.ndarray
    reasons: Mapping[str, np.ndarray]

    @abstractmethod
    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Decode one token per row.

        Args:
            tokens: int64 `(rows,)`.
            places: int64 `(rows,)` or `(1,)`: their positions, as rotary embedding counts them.

        Returns:
            Logits `(rows, vocabulary)`, a new tensor in float32 or, if that is wider, the model's type.
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
    if model.device.type != "cpu":
        raise NotCovered(f"there is no engine for {model.device.type} yet")
    try:
        from recycler.cpu.engine import CpuEngine
    except ImportError as error:
        raise NotCovered(f"the cpu engine needs numba, which is not installed ({error})") from error
    return CpuEngine(model)
