"""`python benchmarks/exact.py`: what exact decoding gains, on the default model with the exported policy.

Milliseconds per token, in turns, beside the same engine with every unit full, which is what is exact without drafts. A
round of n drafts costs n recycled steps and one reading of weights and cache for n + 1 queries; what that may take is
the best rate at which the machine multiplies matrices, printed first. Whether texts are full attention's, and how many
tokens a verification gives, is told by `benchmarks/exact_texts.py`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decode_bench import Bench, Case
from decode_subject import Subject, subject_of
from machine import machine_name
from tqdm import tqdm

from policies import AlwaysFull
from policies.stops import ConfidentDrafts, FixedDrafts, StopRule
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_OUT = Path(__file__).parents[1] / "docs/results/exact.json"


def main(
    shapes: Annotated[str, typer.Option(help="Timed: batch x context, by commas.")] = "1x2000,1x8000,4x8000,1x32000",
    rules: Annotated[
        str, typer.Option(help="Rounds: n drafts, or a least survival below 1, by commas.")
    ] = "4,8,0.2,0.4",
    k: Annotated[int, typer.Option(help="Tokens of a set where time is taken.", min=40)] = 512,
    steps: Annotated[int, typer.Option(help="Steps per case and round.", min=8)] = 96,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _OUT,
) -> dict[str, Any]:
    """Time exact decoding."""
    chosen = {
        name: FixedDrafts(int(name)) if float(name) >= 1 else ConfidentDrafts(float(name), 16)
        for name in rules.split(",")
    }
    of_shapes = [tuple(int(number) for number in shape.split("x")) for shape in shapes.split(",")]
    subject = subject_of(None, None, "float32", None, None)
    result: dict[str, Any] = {
        "machine": machine_name(torch.device("cpu")),
        "versions": versions(),
        "best_gflops": round(_best_gflops(), 1),
        "k": k,
    }
    print(f"matrices are multiplied at {result['best_gflops']} GFLOP/s", flush=True)
    result["times"] = []
    for batch, context in of_shapes:
        result["times"] += _time(subject, chosen, batch, context, k, steps, rounds)
        write_text(out, json.dumps(result, indent=1))
    return {"out": str(out)}


def _best_gflops() -> float:
    """The best of a few products of two matrices that fit into the last cache, in float32."""
    n, times = 1024, []
    matrix = torch.randn(n, n)
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e9


def _time(
    subject: Subject, rules: Mapping[str, StopRule], batch: int, context: int, k: int, steps: int, rounds: int
) -> Sequence[dict[str, Any]]:
    assert subject.selection is not None
    selection = subject.selection.at_k(k)
    cases = [
        Case("every unit full", AlwaysFull()),
        Case("tuned policy", subject.policy, selection=selection),
        *(Case(f"exact, {name}", subject.policy, selection=selection, exact=rule) for name, rule in rules.items()),
    ]
    bench = Bench(subject.model, subject.tokens, k, steps)
    timed: dict[str, list[Any]] = {case.name: [] for case in cases}
    for _ in tqdm(range(rounds), f"{batch} x {context} tokens"):
        for case in cases:
            timed[case.name].append(bench.time(case, context, batch))
    rows = []
    for case in cases:
        pairs = zip(timed[cases[0].name], timed[case.name], strict=True)
        row = {
            "batch": batch,
            "context_tokens": context,
            "case": case.name,
            "step_ms": round(statistics.median(one.step_ms for one in timed[case.name]), 2),
            "times_full": round(statistics.median(full.step_ms / one.step_ms for full, one in pairs), 3),
            "tokens_per_round": timed[case.name][0].tokens_per_round,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    run_command(main)
