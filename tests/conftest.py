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

_HERE = Path(__file__).parent

if not torch.cuda.is_available():
    # Triton looks at it when a kernel is defined, its own library's included: before anybody imports it.
    os.environ["TRITON_INTERPRET"] = "1"


# Files that take longest begin first, so that no process is left with one at the end; after the first, which compiles
# what decodes on a CPU, come some that another process can run meanwhile without it, or with kernels of its own.
_FIRST = (
    "recycler/decode/test_engine_contract.py",
    "recycler/decode/cuda/test_gpu_plan.py",
    "recycler/decode/cuda/test_device.py",
    "recycler/decode/cuda/test_compiles.py",
    "recycler/decode/cpu/test_compiled.py",
    "recycler/decode/test_rounds.py",
    "attack/test_rows.py",
    "tuning/replay/test_matches_decoder.py",
    "recycler/decode/test_identities_default_model.py",
    "recycler/test_generate.py",
    "tuning/optimize/test_optimize_resumes.py",
    "tuning/optimize/test_exact.py",
    "recycler/evaluate/test_tasks_default_model.py",
    "recycler/model/test_threads.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; their tests stay in order."""
    place = {_HERE / name: i for i, name in enumerate(_FIRST)}
    if gone := [path for path in place if not path.exists()]:
        raise pytest.UsageError(f"tests/conftest.py wants to begin with {gone[0]}, which is not there.")
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], Any]:
    """Imports a benchmark, which is a command and in no package, by its name."""

    folder = Path(__file__).parents[1] / "benchmarks"

    def module(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        # Dataclasses look their module up.
        sys.modules[name] = found = importlib.util.module_from_spec(spec)
        # As of a command, whose folder comes first: one may import another.
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            spec.loader.exec_module(found)
        return found

    return module
