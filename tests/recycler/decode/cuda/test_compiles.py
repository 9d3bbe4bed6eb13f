"""Kernels compile for an H200 without one: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_for_hopper.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the script says of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Where this package is not installed, it is on the path.
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    # Nor may it find a GPU, whose driver would be asked instead.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper(compiled: list[dict[str, Any]]) -> None:
    assert {one["kernel"] for one in compiled} == {
        "prepare",
        "walk",
        "merge",
        "score",
        "pick",
        "finish",
        "rank_anew",
        "take_in",
        "vote",
        "_age",
    }
    assert all(one["cubin_bytes"] > 0 for one in compiled)


def test_two_programs_of_the_walk_share_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    # 227 KiB of shared memory, and 1 KiB of it for each program's own use.
    assert all(2 * (one["shared_bytes"] + 1024) <= 227 * 1024 for one in compiled)


def test_keys_and_values_are_copied_sixteen_bytes_at_a_time_ahead_of_their_use(compiled: list[dict[str, Any]]) -> None:
    assert all(one["copies_of_16_bytes"] > 0 for one in compiled if one["kernel"] == "walk")


def test_decisions_are_rounded_as_numpy_rounds(compiled: list[dict[str, Any]]) -> None:
    # A fused product and sum is rounded once, NumPy's twice.
    assert all(one["fused_float64"] == 0 for one in compiled if one["kernel"] == "prepare")
