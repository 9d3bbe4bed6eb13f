"""`python benchmarks/latency.py`: how long somebody waits for the first token, and between tokens.

Means hide what users see: a full step of all units at once, an audit or a verification comes now and then, and its
token waits for it. Median, 95th and 99th percentile of the times between tokens, on the default model with the exported
policy; the first token is prefill with the choice of sets, and what the engine needs to begin is the second's.

A case does the same at the same step of every round, so the median of a step over rounds is what that step takes, and
what is beyond it is what else the machine did: percentiles are told of all times, and of the steps' medians. A policy
that is asked and never looks has steps that are all alike: what it varies by is the machine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from decode_bench import Bench, Case, staggered
from decode_subject import subject_of
from machine import machine_name
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from policies import AlwaysFull, BudgetConstrained, FixedStride, PolicyFile
from policies.stops import FixedDrafts
from recycler import default_prompts, load_model, model_shape, recycled
from recycler.model.generation import generate_tokens
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_RESULTS = Path(__file__).parents[1] / "docs/results"
# A tuned policy's 99th percentile beside its median, at most.
_TARGET = 1.3


def main(
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "2000,8000",
    k: Annotated[int, typer.Option(help="Tokens of a set.", min=40)] = 512,
    steps: Annotated[int, typer.Option(help="Steps per case and round.", min=64)] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases, whose steps are the same.", min=1)] = 4,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _RESULTS / "latency.json",
) -> dict[str, Any]:
    """Time to the first token, and between tokens, all cases in turns."""
    subject = subject_of(None, None, "float32", None, None)
    assert subject.selection is not None
    units, own = model_shape(subject.model).units, subject.selection.at_k(k)
    tuned = Case("tuned policy", subject.policy, selection=own)
    cases = [
        Case("generate"),
        Case("engine, every unit full", AlwaysFull()),
        Case("stride 10, all units at once", FixedStride(10)),
        Case("stride 10, units in turn", staggered(*units, 10)),
        tuned,
        Case("tuned policy, never full", BudgetConstrained(subject.policy, 0.0), selection=own),
        Case("tuned policy, audited every 64 steps", subject.policy, selection=own, audit=64),
        Case("exact, 8 drafts", subject.policy, selection=own, exact=FixedDrafts(8)),
    ]
    bench = Bench(subject.model, subject.tokens, k, steps)
    rows: list[dict[str, Any]] = []
    for context in (int(number) for number in contexts.split(",")):
        between: dict[str, list[float]] = {case.name: [] for case in cases}
        for turn in range(rounds + 1):
            for case in tqdm(cases, desc=f"{context} tokens, {'warm-up' if turn == 0 else f'round {turn}'}"):
                timed = bench.time(case, k if turn == 0 else context, 1)
                between[case.name] += timed.between_ms if turn else []
        rows += [_row(name, context, np.reshape(times, (rounds, -1))) for name, times in between.items()]
    result = {
        "machine": machine_name(subject.model.device),
        "versions": versions(),
        "k": k,
        "steps": steps * rounds,
        "first_token": _first_tokens([int(number) for number in contexts.split(",")], k),
        "rows": rows,
    }
    write_text(out, json.dumps(result, indent=1))
    _print(result)
    return {"out": str(out), "target_met": all(r["p99_to_median"] <= _TARGET for r in rows if r["case"] == tuned.name)}


def _row(case: str, context: int, times_ms: np.ndarray) -> dict[str, Any]:
    """What times `(rounds, steps)` come to."""
    median, p95, p99 = np.percentile(times_ms, (50, 95, 99))
    of_steps = np.median(times_ms, axis=0)
    return {
        "case": case,
        "context_tokens": context,
        "mean_ms": round(float(times_ms.mean()), 2),
        "median_ms": round(float(median), 2),
        "p95_ms": round(float(p95), 2),
        "p99_ms": round(float(p99), 2),
        "longest_ms": round(float(times_ms.max()), 2),
        "p99_to_median": round(float(p99 / median), 3),
        "p99_to_median_of_steps": round(float(np.percentile(of_steps, 99) / np.median(of_steps)), 3),
    }


def _first_tokens(contexts: list[int], k: int) -> list[dict[str, Any]]:
    """Seconds to the first token and milliseconds to the second, stock and recycled, after real prompts."""
    loaded = load_model(None)
    file = PolicyFile.read(_RESULTS / "policy-budget-0.1-512-steps.json").at_k(k)
    found = []
    for context in contexts:
        prompt = default_prompts(
            loaded.tokenizer, n_per_kind=1, context_tokens=context, n_steps=8, kinds=["technical"]
        )[0]
        tokens = prompt.tokens[: prompt.n_prompt_tokens].tolist()
        # Of each twice, as the first compiles and warms.
        for _ in range(2):
            stock = generate_tokens(loaded.model, tokens, max_new_tokens=2)
            with recycled(loaded, file):
                ours = generate_tokens(loaded.model, tokens, max_new_tokens=2)
        found.append(
            {
                "context_tokens": context,
                "stock_s": round(stock.prefill_s, 3),
                "recycled_s": round(ours.prefill_s, 3),
                "stock_second_ms": round(1e3 * stock.decode_s, 1),
                "recycled_second_ms": round(1e3 * ours.decode_s, 1),
            }
        )
    return found


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=140)
    for one in result["first_token"]:
        stock = f"stock {one['stock_s']:.2f} s and {one['stock_second_ms']:.0f} ms"
        first, second = f"{one['recycled_s']:.2f} s", f"{one['recycled_second_ms']:.0f} ms"
        console.print(f"{one['context_tokens']:,} tokens: first token {first}, second {second} later; {stock}")
    table = Table()
    names = [name for name in result["rows"][0] if name != "case"]
    for name in ("case", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "case" else "right")
    for row in result["rows"]:
        table.add_row(row["case"], *(str(row[name]) for name in names))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
