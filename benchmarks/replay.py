"""`python benchmarks/replay.py`: seconds to replay one policy over many traces, beside the bytes that it must read.

Floor: every unit-step reads one number of each array by age that the policy needs, at an age that no prefetcher
foresees: a cache line of 64 bytes in the worst case. Both, and what a sum over 512 MiB reaches, are printed. Traces are
random: the time depends on their size, and on how often units run full, not on their values. They are memory-mapped and
have been read before; the least of several times counts, as only other work on the machine makes one longer.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import typer
from machine import machine_name
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from policies import BudgetConstrained, CosineThreshold, FixedStride, LearnedLogistic, StepPolicy
from traces import Trace, TraceHeader, write_trace
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from tuning.replay.run import replay_policy
from tuning.replay.trace_batch import TraceBatch

_LINE_BYTES = 64
_PROMPT_TOKENS = 16
_RESULTS = Path(__file__).parent / "results"


def main(
    traces: Annotated[int, typer.Option(help="Traces.", min=1)] = 100,
    steps: Annotated[int, typer.Option(help="Steps of each.", min=1)] = 512,
    max_age: Annotated[int, typer.Option(help="Ages of each.", min=1)] = 64,
    layers: Annotated[int, typer.Option(help="Layers.", min=1)] = 30,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="Replays of each policy; the fastest counts.", min=1)] = 15,
    out: Annotated[
        Path | None, typer.Option(help="File for the result; default: benchmarks/results/replay-MACHINE.json.")
    ] = None,
) -> dict[str, Any]:
    """Time the replay of policies of several kinds."""
    units = (layers, kv_heads)
    console = Console(highlight=False)
    n_threads = numba.config.NUMBA_NUM_THREADS
    bandwidth = _bandwidth(n_threads)
    console.print(f"{machine_name()}: {n_threads} threads read {bandwidth / 1e9:.1f} GB/s")
    table = Table()
    for name in ("policy", "seconds", "CPU seconds", "full share", "GB needed", "GB in lines", "GB/s in lines"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_trace(_random_trace(f"random-{i:03d}", steps, max_age, units, i), folder)
            for i in tqdm(range(traces), desc="writing traces", unit="trace")
        ]
        batch = TraceBatch(files)
        for name, (policy, n_arrays) in _policies(units).items():
            full_share = replay_policy(batch, policy).full_share  # Compiles, and brings the files into memory.
            times = [_seconds(lambda: replay_policy(batch, policy)) for _ in range(rounds)]  # noqa: B023
            seconds, cpu_seconds = (min(column) for column in zip(*times, strict=True))
            needed = traces * steps * layers * kv_heads * n_arrays * 4
            in_lines = needed // 4 * _LINE_BYTES
            rows.append(
                {
                    "policy": name,
                    "seconds": round(seconds, 4),
                    # Of all threads together: what other work on the machine hardly changes.
                    "cpu_seconds": round(cpu_seconds, 4),
                    "full_share": round(full_share, 4),
                    "needed_bytes_per_s": round(needed / seconds),
                    "line_bytes_per_s": round(in_lines / seconds),
                }
            )
            shown = (f"{needed / 1e9:.3f}", f"{in_lines / 1e9:.2f}", f"{in_lines / seconds / 1e9:.1f}")
            table.add_row(name, f"{seconds:.3f}", f"{cpu_seconds:.3f}", f"{full_share:.3f}", *shown)
        of_files = _memory_of_files()
    console.print(table)
    slowest = max(rows, key=lambda row: float(row["seconds"]))
    result = {
        "seconds_per_policy": slowest["seconds"],
        "traces": traces,
        "steps": steps,
        "layers": layers,
        "kv_heads": kv_heads,
        "max_age": max_age,
        "needed_bytes_per_s": slowest["needed_bytes_per_s"],
        "line_bytes_per_s": slowest["line_bytes_per_s"],
        "machine_bytes_per_s": round(bandwidth),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        # What the system takes back when it needs it.
        "of_which_mapped_files_mib": of_files,
        "machine": machine_name(),
        "threads": n_threads,
        "load_average": round(os.getloadavg()[0], 1),
        "rounds": rounds,
        "rows": rows,
    }
    machine = re.sub("[^0-9A-Za-z]+", "-", machine_name()).strip("-")
    write_text(out or _RESULTS / f"replay-{machine}.json", json.dumps(result, indent=1) + "\n")
    return result


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of all processors."""
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - cpu_began


def _memory_of_files() -> int | None:
    """MiB of mapped files that are in memory; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("RssFile:")), None)


def _policies(units: tuple[int, int]) -> dict[str, tuple[StepPolicy, int]]:
    """Policies, and how many arrays by age each reads."""
    rng = np.random.default_rng(0)
    rates = np.clip(rng.lognormal(-2.8, 0.8, units), 0.002, 1).tolist()
    thresholds = rng.uniform(0.3, 0.7, units).tolist()
    features = ("sqrt_age", "inverse_age", "query_drift", "step_drift", "refresh_loss")
    logistic = LearnedLogistic(features, (0.3, -1.0, 2.0, 1.0, 1.0), rng.normal(-3, 1, units).tolist())
    strides = [[1 / rate for rate in row] for row in rates]
    return {
        "stride per unit in accounts": (BudgetConstrained(FixedStride(strides), rates), 1),
        "cosine per unit in accounts": (BudgetConstrained(CosineThreshold(thresholds), rates), 2),
        "logistic model in accounts": (BudgetConstrained(logistic, rates), 2),
    }


def _random_trace(name: str, steps: int, max_age: int, units: tuple[int, int], seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    by_age = (steps, max_age, *units)
    header = TraceHeader(
        model={"id": "random", "layers": units[0], "kv_heads": units[1]},
        selection={},
        prompt={"name": name, "kind": "random", "n_prompt_tokens": _PROMPT_TOKENS},
        n_steps=steps,
        ages=range(1, max_age + 1),
        versions={},
    )
    return Trace(
        header=header,
        tokens=np.zeros(_PROMPT_TOKENS + steps, dtype=np.int32),
        recovered_mass=rng.random(by_age, dtype=np.float32),
        query_similarity=rng.random(by_age, dtype=np.float32),
        overlap=np.zeros(by_age, dtype=np.float32),
        fresh_mass=rng.random((steps + 1, *units), dtype=np.float32),
        token_log_prob=np.zeros(steps, dtype=np.float32),
    )


def _bandwidth(n_threads: int) -> float:
    """Bytes per second that sums on several threads read, the best of five."""
    parts = np.array_split(np.ones(2**26), n_threads)
    with ThreadPoolExecutor(n_threads) as threads:
        best = min(_seconds(lambda: list(threads.map(np.sum, parts)))[0] for _ in range(5))
    return sum(part.nbytes for part in parts) / best


if __name__ == "__main__":
    run_command(main)
