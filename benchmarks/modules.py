"""`python benchmarks/modules.py`: what a model pays for modules of its own, per token beside stock `generate`.

The default model three times: with all of its layers in the CPU engine's kernels; with a hook in a layer, so that its
own modules run around compiled attention, as those of all other families do; and on the plain path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from decode_bench import Bench, Case, Timed
from decode_subject import subject_of
from machine import machine_name
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from policies import AlwaysFull
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_RESULT = Path(__file__).parents[1] / "docs/results/modules.json"
_PATHS = ("cpu", "cpu_modules", "plain")


def main(
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "2000,8000",
    k: Annotated[int, typer.Option(help="Tokens of a set.", min=40)] = 128,
    steps: Annotated[int, typer.Option(help="Steps per case and round.", min=8)] = 40,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases; medians are reported.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = _RESULT,
) -> dict[str, Any]:
    """Time all paths in turns."""
    subject = subject_of(None, None, "float32", None, None)
    assert subject.selection is not None
    bench, own = Bench(subject.model, subject.tokens, k, steps), subject.selection.at_k(k)
    stock = Case("generate")
    cases = {
        (policy, path): Case(f"{policy}, {path}", of_policy, selection=own, fast=path != "plain")
        for policy, of_policy in (("always full", AlwaysFull()), ("tuned", subject.policy))
        for path in _PATHS
    }
    rows = []
    for context in (int(number) for number in contexts.split(",")):
        timed: dict[Any, list[Timed]] = {key: [] for key in (None, *cases)}
        for turn in tqdm(range(rounds + 1), desc=f"{context:,} tokens", unit="round"):
            for key, case in {None: stock, **cases}.items():
                with _hooked(subject.model.model.layers[0], key is not None and key[1] == "cpu_modules"):
                    one = bench.time(case, context, 1)
                timed[key] += [one] * (turn > 0)
        for policy, path in cases:
            runs = timed[policy, path]
            assert {run.engine for run in runs} == {path}
            shares = [run.step_ms / beside.step_ms for run, beside in zip(runs, timed[None], strict=True)]
            rows.append(
                {
                    "context_tokens": context,
                    "policy": policy,
                    "path": path,
                    "step_ms": round(float(np.median([run.step_ms for run in runs])), 2),
                    "stock_ms": round(float(np.median([run.step_ms for run in timed[None]])), 2),
                    "of_stock": round(float(np.median(shares)), 3),
                }
            )
    table = Table("tokens", "policy", "path", "ms per token", "of stock's time")
    for row in rows:
        shown = (
            f"{row['context_tokens']:,}",
            row["policy"],
            row["path"],
            f"{row['step_ms']:.1f}",
            f"{row['of_stock']:.2f}",
        )
        table.add_row(*shown)
    Console().print(table)
    result = {"machine": machine_name(subject.model.device), "k": k, "rows": rows, "versions": versions()}
    write_text(out, json.dumps(result, indent=1) + "\n")
    return {"out": str(out)}


@contextmanager
def _hooked(module: nn.Module, wanted: bool) -> Iterator[None]:
    """A model with a hook keeps its own modules."""
    handle = module.register_forward_hook(lambda *_: None) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


if __name__ == "__main__":
    run_command(main)
