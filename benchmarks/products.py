"""`python benchmarks/products.py`: all products of a decode step by the CPU engine's tiles, beside torch's.

The default model's matrices, in float32, at so many rows. No product is faster than reading the weights once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from machine import machine_name
from numba import njit, prange

from recycler.decode.cpu.linear import FIRST_COLUMN, REPLACE, linear
from recycler.model.threads import threads_of_torch
from traces.reporting.command import run_command

# Outputs x inputs, and how often: queries, keys and values; output; gate and up; down; the head.
_MATRICES = (((960, 576), 30), ((576, 576), 30), ((3072, 576), 30), ((576, 1536), 30), ((49152, 576), 1))


def main(
    rows: Annotated[str, typer.Option(help="Rows, by commas.")] = "1,4,6,8,9,16,24,32,48,96",
    rounds: Annotated[int, typer.Option(help="Of which the best counts.", min=1)] = 7,
) -> dict[str, Any]:
    """Print milliseconds and GFLOP/s."""
    n_threads, found = threads_of_torch(), []
    for n_rows in (int(number) for number in rows.split(",")):
        tiles_ms = torch_ms = flop = 0.0
        for (outputs, inputs), n_layers in _MATRICES:
            x, weight = (np.ones(shape, dtype=np.float32) for shape in ((n_rows, inputs), (outputs, inputs)))
            out, nothing = np.zeros((n_rows, outputs), dtype=np.float32), np.zeros(0, dtype=np.float32)
            tiles_ms += n_layers * _best_ms(partial(_multiply, x, weight, nothing, out, n_threads), rounds)
            torch_ms += n_layers * _best_ms(partial(torch.mm, torch.from_numpy(x), torch.from_numpy(weight).T), rounds)
            flop += n_layers * 2 * n_rows * outputs * inputs
        row = {"rows": n_rows, "tiles_ms": round(tiles_ms, 1), "torch_ms": round(torch_ms, 1)}
        row |= {"tiles_gflops": round(flop / tiles_ms / 1e6, 1), "torch_gflops": round(flop / torch_ms / 1e6, 1)}
        print(row, flush=True)
        found.append(row)
    return {"machine": machine_name(torch.device("cpu")), "threads": n_threads, "rows": found}


@njit(parallel=True, fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _multiply(x: Any, weight: Any, bias: Any, out: Any, n_threads: int) -> None:
    for thread in prange(n_threads):
        low, high = thread * weight.shape[0] // n_threads, (thread + 1) * weight.shape[0] // n_threads
        linear(x, weight, bias, out, FIRST_COLUMN, low, high, REPLACE)


def _best_ms(multiply: Callable[[], Any], rounds: int) -> float:
    multiply()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


if __name__ == "__main__":
    run_command(main)
