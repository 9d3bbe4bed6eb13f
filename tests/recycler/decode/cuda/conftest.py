"""The GPU engine's kernels, on a GPU if there is one and else in Triton's interpreter, which runs them on NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> Iterator[None]:
    """Two faults of the interpreter (3.6 to 3.9): bfloat16 in `tl.dot` as whole numbers, and hours of patching."""
    if HAS_GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
        dot, launch, patch_lang = builder.create_dot, interpreter.GridExecutor.__call__, interpreter._patch_lang
        patched: set[str] = set()

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            # Products of two bfloat16 are exact in float32, in which a GPU sums them too.
            wide = [
                interpreter.TensorHandle(self.create_fp_ext(x, interpreter.tl.float32).data, interpreter.tl.float32)
                if x.dtype == interpreter.tl.bfloat16
                else x
                for x in (a, b)
            ]
            return dot(self, *wide, *rest)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # As it is, but `triton.language` is patched once per launch and module, not at every call in a kernel.
            if self.fn.__module__ not in patched:
                patched.add(self.fn.__module__)
                patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
            patched.clear()
            return launch(self, *args, **kwargs)

        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(function, "__call__", call)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return DEVICE


@pytest.fixture(scope="session")
def machine() -> Machine:
    """Small shares, tiles and chunks, so that little work is cut into many; on a GPU, captured and compiled."""
    return Machine(n_programs=3, tile_bytes=16 * 16 * 4, chunk_tokens=16, captures=HAS_GPU, compiles=HAS_GPU)


@pytest.fixture
def on_engine(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Callable[..., None]:
    """Lets `recycled` run models on this engine, wherever they are."""

    def use(**other: Any) -> None:
        how = Machine(**(vars(machine) | other))
        monkeypatch.setattr(engines, "engine_for", lambda model: CudaEngine(model, how))

    return use
