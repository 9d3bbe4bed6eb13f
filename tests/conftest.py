"""Before any test: without a GPU, Triton's kernels run in its interpreter, on NumPy."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at it when a kernel is defined, its own library's included: before anybody imports it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], Any]:
    """Imports a benchmark, which is a command and in no package, by its name."""

    def module(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        # Dataclasses look their module up.
        sys.modules[name] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return module
