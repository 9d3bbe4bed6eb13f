"""Which engine runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import DynamicCache, PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.engine import Decoding, Drafting, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.plain.decoding import PlainEngine
from recycler.model.decoder_parts import NotCovered


class Begun(NamedTuple):
    """A decoding, and what a receipt says of who runs it.

    Attributes:
        decoding: The decoding.
        engine: Name of its engine.
        why_plain: Why it is the plain path, or runs the model's own modules, as a clause; empty if it does not.
    """

    decoding: Decoding
    engine: str
    why_plain: str


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
        try:
            return CpuEngine(model)
        except NotCovered as reason:
            from recycler.decode.cpu.modules import CpuModulesEngine

            return CpuModulesEngine(model, str(reason))
    if model.device.type == "cuda":
        try:
            from recycler.decode.cuda.engine import CudaEngine
        except ImportError as error:
            raise NotCovered(f"the cuda engine needs triton, which is not installed ({error})") from error
        return CudaEngine(model)
    raise NotCovered(f"there is no engine for {model.device.type} yet")


def begin_drafting(model: PreTrainedModel, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> Drafting:
    """Begin to draft and verify on the model's engine, or on the plain path; arguments as of `Engine.begin_drafts`.

    Raises:
        NotCovered: If the model has layers that cannot take back drafts.
    """
    try:
        return engine_for(model).begin_drafts(layers, first, policy)
    except NotCovered:
        return PlainEngine(model).begin_drafts(layers, first, policy)


def begin_decoding(
    model: PreTrainedModel,
    layers: Sequence[KvLayer],
    first: FirstSets,
    policy: StepPolicy,
    *,
    passing: DynamicCache | None = None,
    fast: bool = True,
) -> Begun:
    """Begin on the model's engine, or on the plain path where that does not cover the model or the selection.

    Args:
        model: The model.
        layers: As in `Engine.begin`, like what follows.
        first: What the prompt left behind.
        policy: Who decides.
        passing: The cache of layers that pass through; None if all are recycled.
        fast: False keeps to the plain path, which is slower, and as right.
    """
    why_plain = "fast is False"
    if fast:
        try:
            engine = engine_for(model)
            return Begun(engine.begin(layers, first, policy, passing), engine.name, engine.why_modules)
        except NotCovered as reason:
            why_plain = str(reason)
    return Begun(PlainEngine(model).begin(layers, first, policy, passing), PlainEngine.name, why_plain)
