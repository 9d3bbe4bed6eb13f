"""`python benchmarks/pairs.py --before CHECKOUT --after .`: is decoding as fast as it was?

Two checkouts decode the same prompt by stock `generate`, each in a process of its own, and take turns: some steps of
one, as many of the other, in changing order, while the other one sleeps. What a noisy neighbour does to a turn it does
to both. A pair's ratio is the time of `after` over that of `before`; the rule is on the median of all pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import machine_name
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

# What the median may lose, and what the upper end of its interval may.
MEDIAN, INTERVAL = 0.02, 0.03
CASES = ("tuned", "stride", "full", "never", "by keys")
_POLICY = Path(__file__).parents[1] / "docs/results/policy-budget-0.1.json"


def main(
    before: Annotated[Path, typer.Option(help="A checkout of the project.")],
    after: Annotated[Path, typer.Option(help="Another one.")] = Path(),
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "2000,8000,32000",
    cases: Annotated[str, typer.Option(help=f"Some of {', '.join(CASES)}, by commas.")] = "tuned",
    pairs: Annotated[int, typer.Option(help="Alternated pairs.", min=2)] = 40,
    steps: Annotated[int, typer.Option(help="Steps of a turn.", min=1)] = 20,
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    policy_before: Annotated[Path, typer.Option(help="Policy of the case tuned; format 1 for a 0.1.")] = _POLICY,
    policy_after: Annotated[Path, typer.Option(help="The same of the other checkout.")] = _POLICY,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> dict[str, Any]:
    """Time two checkouts in turns."""
    asked = [case.strip() for case in cases.split(",")]
    for case in asked:
        if case not in CASES:
            raise ValueError(f"the case {case!r} is unknown: use some of {', '.join(CASES)}.")
    if steps % 10:
        raise ValueError(f"--steps must be a multiple of 10, so that strides of 10 come out even, not {steps}.")
    sides = ((before, policy_before), (after, policy_after))
    rows = []
    for context in (int(number) for number in contexts.split(",")):
        for case in asked:
            rows.append(_compare(sides, case, context, pairs, steps, batch, dtype))
            _print(rows)
    result = {
        "machine": machine_name(),
        "before": _revision(before),
        "after": _revision(after),
        "policies": [policy_before.name, policy_after.name],
        "pairs": pairs,
        "steps": steps,
        "batch": batch,
        "dtype": dtype,
        "rows": rows,
    }
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def _compare(
    sides: Sequence[tuple[Path, Path]], case: str, context: int, pairs: int, steps: int, batch: int, dtype: str
) -> dict[str, Any]:
    settings = {"case": case, "context": context, "turns": pairs, "steps": steps, "batch": batch, "dtype": dtype}
    workers = [_Worker(checkout, settings | {"policy": str(policy.resolve())}) for checkout, policy in sides]
    ms = np.empty((pairs, 2))
    for pair in tqdm(range(pairs), desc=f"{case}, {context:,} tokens", unit="pair"):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            ms[pair, side] = workers[side].turn() * 1e3 / steps
    tokens = [worker.end() for worker in workers]
    ratio = ms[:, 1] / ms[:, 0]
    draws = np.random.default_rng(0).integers(0, pairs, (10_000, pairs))
    low, high = np.quantile(np.median(ratio[draws], axis=1), [0.025, 0.975])
    return {
        "case": case,
        "context_tokens": context,
        "before_ms": round(statistics.median(ms[:, 0]), 3),
        "after_ms": round(statistics.median(ms[:, 1]), 3),
        "ratio": round(float(np.median(ratio)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "same_tokens": tokens[0] == tokens[1],
        "kept": bool(np.median(ratio) <= 1 + MEDIAN and high <= 1 + INTERVAL),
    }


class _Worker:
    """A process that decodes with one checkout, a turn at a time."""

    def __init__(self, checkout: Path, settings: dict[str, Any]) -> None:
        path = os.pathsep.join(str(checkout.resolve() / part) for part in ("benchmarks", ""))
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("pairs_worker.py"), json.dumps(settings)],
            env=os.environ | {"PYTHONPATH": path},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Ready once it has read the prompt and has taken the first steps.
        self._answer()

    def turn(self) -> float:
        """Take some steps; seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer())

    def end(self) -> str:
        """The digest of all tokens."""
        digest = self._answer()
        self._process.wait()
        return digest

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"a worker ended with {self._process.wait()}.")
        return line.strip()


def _revision(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(highlight=False, stderr=True).print(table)


if __name__ == "__main__":
    run_command(main)
