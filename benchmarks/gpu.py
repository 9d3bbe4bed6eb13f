"""`python benchmarks/gpu.py --minutes 8`: what a GPU is asked, in order, when there are only minutes of one.

Identities come first, then timings in the order of what they are worth. After each stage the JSON is written, and
another run goes on where the last one ended. A stage that would not fit the time left is not begun, and one that fails
leaves its traceback.

Without a GPU, `TRITON_INTERPRET=1 python benchmarks/gpu.py` rehearses every stage on a tiny model in Triton's
interpreter: its times say nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import triton
import typer
from decode_bench import best_read_gb_per_s, copy_gb_per_s
from gpu_exact import exact, kernels_of_rounds
from gpu_identities import IdentitySizes, identities
from gpu_kernels import attention_calls, kernels_of_steps, tune_walk
from gpu_timings import Sizes, TimedModel, recording
from machine import machine_name, not_measured

from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text


@dataclass(frozen=True)
class Stage:
    """Something to measure.

    Attributes:
        name: In the JSON.
        seconds: What it is thought to take; it is not begun with less time left.
        measure: Does so.
    """

    name: str
    seconds: float
    measure: Callable[[], Any]


def main(
    minutes: Annotated[float, typer.Option(help="Time for all stages; none begins that would not fit.", min=0.1)] = 8.0,
    out: Annotated[Path, typer.Option(help="JSON, written after each stage; what it holds is not run again.")] = Path(
        "gpu.json"
    ),
    only: Annotated[
        list[str] | None, typer.Option(help="Run only stages whose names begin so; may be given again.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds through the cases of a timing; default: 3.", min=1)] = None,
    static_stock: Annotated[bool, typer.Option(help="Time stock generate with static caches too.")] = True,
) -> dict[str, Any]:
    """Identities, then timings, of the CUDA engine on a GPU."""
    began = time.monotonic()
    rehearses = not torch.cuda.is_available() and triton.knobs.runtime.interpret
    if not rehearses and (nothing := not_measured("cuda")) is not None:
        return nothing
    device = torch.device("cpu" if rehearses else "cuda")
    run = {"machine": machine_name(device), "rehearsed": rehearses, "versions": versions()}
    results = json.loads(out.read_text()) if out.exists() else run
    if other := [name for name in run if results.get(name) != run[name]]:
        raise ValueError(f"{out} is of another run ({', '.join(other)} differ): give another --out.")
    done: dict[str, Any] = results.setdefault("stages", {})
    failed, left_out = [], []
    with _in_interpreter() if rehearses else nullcontext():
        sizes = Sizes.rehearsed() if rehearses else Sizes.for_gpu(device)
        sizes = dataclasses.replace(sizes, rounds=rounds or sizes.rounds, static_stock=static_stock)
        for stage in _plan(device, sizes):
            if stage.name in done or (only and not stage.name.startswith(tuple(only))):
                continue
            stage_began = time.monotonic()
            if not rehearses and stage_began - began + stage.seconds > 60 * minutes:
                left_out.append(stage.name)
                continue
            try:
                found = stage.measure()
            except Exception:
                print(f"{stage.name} FAILED:\n{traceback.format_exc()[-3000:]}", flush=True)
                failed.append(stage.name)
                continue
            done[stage.name] = found
            write_text(out, json.dumps(results, indent=1))
            print(f"\n{stage.name} ({time.monotonic() - stage_began:.1f} s)", flush=True)
            for row in found if isinstance(found, list) else [found]:
                print("  " + _line(row), flush=True)
    wrong = [row["claim"] for row in done.get("identities", ()) if not row["holds"]]
    return {"out": str(out), "failed": failed, "left_out": left_out, "identities_that_fail": wrong}


def _plan(device: torch.device, sizes: Sizes) -> list[Stage]:
    timed = TimedModel(sizes, device)
    pairs = [(f"batch {batch} x {context}", batch, context) for batch, context in sizes.cases]

    def bandwidth() -> dict[str, float]:
        return {"read_gb_per_s": best_read_gb_per_s(device), "copy_gb_per_s": copy_gb_per_s(device)}

    return [
        Stage("bandwidth", 5, bandwidth),
        Stage("identities", 60, lambda: list(identities(IdentitySizes.of(device), device))),
        *(
            stage
            for at, batch, context in pairs[:2]
            for stage in (
                Stage(f"beside stock, {at}", 100, lambda b=batch, c=context: timed.rows(b, c)),
                Stage(f"exact, {at}", 40, lambda b=batch, c=context: exact(timed, b, c)),
                Stage(f"kernels, {at}", 15, lambda b=batch, c=context: kernels_of_steps(timed, b, c)),
                Stage(f"kernels of rounds, {at}", 20, lambda b=batch, c=context: kernels_of_rounds(timed, b, c)),
            )
        ),
        Stage("recording", 30, lambda: recording(timed)),
        *(
            Stage(f"beside stock, {at}", 60, lambda b=batch, c=context: timed.rows(b, c))
            for at, batch, context in pairs[2:]
        ),
        Stage("walk", 45, lambda: tune_walk(timed)),
        Stage("attention calls", 15, lambda: attention_calls(sizes, device)),
    ]


@contextmanager
def _in_interpreter() -> Iterator[None]:
    machine = Machine(3, tile_bytes=2048, chunk_tokens=64, captures=False, compiles=False)
    with patch.object(engines, "engine_for", lambda model: CudaEngine(model, machine)):
        yield


def _line(row: Any) -> str:
    if not isinstance(row, dict):
        return str(row)
    kernels = "".join(
        f"\n      {one['us_per_step']:9.1f} us = {one['per_step']:7.2f} x {one['us_each']:8.2f}  {one['kernel']}"
        for one in row.get("kernels", ())
    )
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "kernels") + kernels


if __name__ == "__main__":
    run_command(main)
