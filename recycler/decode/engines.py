"""Which engine runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from transformers import DynamicCache, PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.engine import Decoding, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.plain.decoding import PlainEngine
from recycler.model.decoder_parts import NotCovered


def engine_for(model: PreTrainedModel) -> Engine:
    """The fast engine for a model's device, imported when somebody asks for it.

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


def begin_decoding(
    model: PreTrainedModel,
    layers: Sequence[KvLayer],
    first: FirstSets,
    policy: StepPolicy,
    *,
    passing: DynamicCache | None = None,
    fast: bool = True,
) -> Decoding:
    """Begin on the model's engine, or on the plain path where that does not cover the model or the selection.

    Args:
        model: The model.
        layers: As in `Engine.begin`, like what follows.
        first: What the prompt left behind.
        policy: Who decides.
        passing: The cache of layers that pass through; None if all are recycled.
        fast: False keeps to the plain path, which is slower, and as right.
    """
    if fast and passing is None:
        with suppress(NotCovered):
            return engine_for(model).begin(layers, first, policy)
    return PlainEngine(model, passing).begin(layers, first, policy)
