"""Kernels of several processes: one compiles, and what is kept is of the right type."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numba
import numpy as np
import pytest
from filelock import FileLock

from policies.compiled import kernel
from policies.compiled.kernel import _KeptFiles, helper

# Its digest comes from outside: another one stands for a change in the sources that it is made of.
MODULE = """
import sys
from policies.compiled.kernel import stamped_kernel

@stamped_kernel(sys.argv[1])
def twice(x):
    return 2 * x
"""
# Waits until another process has come as far.
PROGRAM = """
import sys, time
from pathlib import Path
from module_with_kernel import twice
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
assert twice(3) == 6
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of processes that find the module, and keep its kernel in a folder of this test."""
    (tmp_path / "module_with_kernel.py").write_text(MODULE)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(kernel.__file__).parents[2])]),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }


def test_of_two_processes_one_compiles_and_the_other_waits_for_it(tmp_path: Path, environment: dict[str, str]) -> None:
    here = [str(tmp_path / name) for name in ("one", "other")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "digest", *files],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for files in (here, here[::-1])
    ]
    told = [process.communicate(timeout=300) for process in running]
    assert sorted(out.strip() for out, _ in told) == ["0 1", "1 0"]
    # Whoever compiles says so, and where it is kept.
    said = {out.strip(): error for out, error in told}
    assert said["0 1"].startswith("compiling kernels for this machine, once")
    assert str(tmp_path / "cache") in said["0 1"]
    assert said["1 0"] == ""


ONCE = """
from module_with_kernel import twice
assert twice(3) == 6
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def test_a_kernel_on_disk_is_used_until_the_digest_of_its_sources_changes(environment: dict[str, str]) -> None:

    def hits_and_misses(digest: str) -> str:
        command = [sys.executable, "-c", ONCE, digest]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert [hits_and_misses(digest) for digest in ("one", "one", "other", "other")] == ["0 1", "1 0", "0 1", "1 0"]


def test_what_is_kept_of_a_kernel_is_read_and_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    files = _KeptFiles(str(tmp_path), "kernel", "stamp")
    files.save("type", "code")
    # Threads wait for each other as processes do.
    with ThreadPoolExecutor() as pool:
        with FileLock(f"{files._index_path}.lock"):
            waiting = [pool.submit(files.load, "type"), pool.submit(files.save, "another type", "other code")]
            assert not wait(waiting, timeout=0.3).done
        assert waiting[0].result(timeout=60) == "code"
    assert (files.load("type"), files.load("another type")) == ("code", "other code")


@helper()
def _twice(x: int) -> int:
    return 2 * x


@helper()
def _polynomial(x: float) -> float:
    # More than LLVM takes into a caller by itself.
    for _ in range(3):
        for power in range(40):
            if x > power:
                x = x / (1 + power) + np.sqrt(x * power) + np.exp(-x) - np.log(1 + x * x) * np.cos(x)
            else:
                x = x * power - np.sin(x) / (2 + power) + np.tanh(x) + np.log1p(x * x) * np.cos(power * x)
    return x


def test_helpers_are_compiled_into_kernels_so_that_no_process_has_another_copy() -> None:
    kernel = numba.njit(lambda x: _polynomial(x) + _polynomial(x + 1) * _polynomial(2 * x))
    kernel(1.5)
    (code,) = kernel.inspect_llvm().values()
    calls = [line for line in code.splitlines() if " call " in line and "_polynomial" in line]
    assert calls == []


def test_kernels_call_helpers_and_python_is_told_that_it_cannot() -> None:
    assert numba.njit(lambda x: _twice(x))(3) == 6
    with pytest.raises(TypeError, match="_twice is for kernels alone"):
        _twice(3)


PARTS = """
import sys
import numba, numpy as np
from numba import prange
from numba.core import codegen
from policies.compiled.kernel import helper, stamped_kernel

made = []
stock = codegen.JITCodeLibrary._finalize_specific
codegen.JITCodeLibrary._finalize_specific = lambda library: (made.append(library.name), stock(library))

@helper()
def squared(x):
    return x * x

@stamped_kernel("inner")
def inner(x):
    return squared(x) + 1

@stamped_kernel("outer", parallel=True)
def outer(x):
    for i in prange(len(x)):
        x[i] = squared(x[i]) + np.median(x[i] * np.ones(3))
    return inner(x[0])

x = np.arange(1.0, 5.0)
assert (outer(x), x.tolist()) == (5.0, [2.0, 6.0, 12.0, 20.0])
# What others compile beside it is numba's own affair, as is its runtime.
assert numba.njit(lambda x: x + 1)(1) == 2
assert set(made) - {"nrt"} == {*sys.argv[1:], "<lambda>"}, made
"""


def test_machine_code_is_made_of_kernels_and_of_nothing_that_they_are_made_of(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    # From disk one brings with it what it calls.
    for kernels in (["inner", "outer"], ["outer"]):
        subprocess.run([sys.executable, str(tmp_path / "parts.py"), *kernels], env=environment, check=True)
