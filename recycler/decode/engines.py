"""Which engine runs a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from recycler.decode.engine import Engine
from recycler.model.decoder_parts import NotCovered


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
