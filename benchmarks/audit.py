"""`python benchmarks/audit.py`: what audits cost, on the default model with the exported policy.

Steps with and without audits in turns, medians of what each round gives; full attention beside them. An audit repeats N
steps in one forward, so that its floor is reading the weights once more, and the cache.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from decode_bench import Bench, Case, Timed
from decode_subject import subject_of
from machine import machine_name
from tqdm import tqdm

from policies import AlwaysFull
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_OUT = Path(__file__).parents[1] / "docs/results/audit.json"


def main(
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "2000,8000",
    every: Annotated[str, typer.Option(help="Steps from one audit to the next, by commas.")] = "64,16",
    k: Annotated[int, typer.Option(help="Tokens of a set.", min=40)] = 512,
    steps: Annotated[int, typer.Option(help="Steps per case and round, a multiple of all of --every.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _OUT,
) -> dict[str, Any]:
    """Time decoding with and without audits."""
    numbers = [int(number) for number in every.split(",")]
    for number in numbers:
        if steps % number:
            raise ValueError(f"--steps must be a multiple of each of --every, and {steps} is none of {number}.")
    subject = subject_of(None, None, "float32", None, None)
    assert subject.selection is not None
    selection = subject.selection.at_k(k)
    plainly = Case("tuned policy", subject.policy, selection=selection)
    cases = [
        Case("every unit full", AlwaysFull()),
        plainly,
        *(Case(f"audited every {n} steps", subject.policy, selection=selection, audit=n) for n in numbers),
        *(
            Case(f"{n // 4} of every {n} steps", subject.policy, selection=selection, audit=n, audit_tokens=n // 4)
            for n in numbers
            if n % 4 == 0
        ),
    ]
    bench = Bench(subject.model, subject.tokens, k, steps)
    rows = []
    for context in (int(number) for number in contexts.split(",")):
        timed: dict[str, list[Timed]] = {case.name: [] for case in cases}
        for case in tqdm(cases, f"{context} tokens, warm-up"):
            bench.time(case, k, 1)
        for _ in tqdm(range(rounds), f"{context} tokens"):
            for case in cases:
                timed[case.name].append(bench.time(case, context, 1))
        for case in cases:
            pairs = zip(timed[case.name], timed[plainly.name], strict=True)
            row = {
                "context_tokens": context,
                "case": case.name,
                "step_ms": round(statistics.median(one.step_ms for one in timed[case.name]), 2),
                "of_tuned": round(statistics.median(one.step_ms / other.step_ms for one, other in pairs), 3),
            }
            rows.append(row)
            print(row, flush=True)
    result = {"model": subject.name, "machine": machine_name(), "steps": steps, "rounds": rounds, "k": k, "rows": rows}
    write_text(out, json.dumps(result | {"versions": versions()}, indent=1))
    return result


if __name__ == "__main__":
    run_command(main)
