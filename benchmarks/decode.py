"""`python benchmarks/decode.py`: tokens per second against the context, next to the memory floor and stock `generate`.

Floor: (weights + keys and values read) / bandwidth, the bandwidth being what a sum over 1 GiB reaches. Ideal time of a
policy: its full share x time of the same engine with every unit full + the rest x time of the same engine at a context
of k tokens. Both are printed first, by context; a row's shares are of the same round.

The cache is a real prompt's of 2,048 tokens, repeated to the context: times depend on its size and not on its values,
and a prefill of 32,000 tokens takes minutes. Positions beyond the model's range are meant.

`--device cuda` measures a model with random weights in the shape of Llama-3.1-8B at sizes for a GPU, prints the targets
beside what was reached, and says "not measured" where there is no GPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decode_bench import Bench, Case, Timed, Traffic, best_read_gb_per_s, bookkeeping_share, staggered
from decode_picture import draw
from decode_subject import USUAL, subject_of
from decode_targets import on_h200
from llama import LlamaTimes
from machine import machine_name, not_measured
from rich.console import Console
from rich.table import Table

from policies import (
    AlwaysFull,
    BudgetConstrained,
    FixedStride,
    NeverFull,
)
from recycler import model_shape
from recycler.model.versions import versions
from traces.reporting.command import run_command


@contextmanager
def _progress(console: Console, text: str) -> Iterator[None]:
    with console.status(text):
        yield


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in this shape: llama-3.1-8b (the default on cuda) or tiny.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (cpu), bfloat16 (cuda), float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens of context, by commas.")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows, by commas; what does not fit is left out.")] = None,
    k: Annotated[int | None, typer.Option(help="Tokens of a set: 512 (cpu), 2048 (cuda).", min=40)] = None,
    policy: Annotated[Path | None, typer.Option(help="A tuned policy to time; default: docs/results.")] = None,
    steps: Annotated[int, typer.Option(help="Steps per case and round, a multiple of 10.", min=10)] = 40,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds through all cases; medians are reported: 5 (cpu), 3 (cuda).", min=1)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.", min=1)] = None,
    tune: Annotated[
        bool, typer.Option(help="Let torch search for its fastest kernels on a GPU: minutes, once.")
    ] = False,
    llama: Annotated[Path | None, typer.Option(help="JSON of benchmarks/llama.py, for the same table.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to draw tokens/s against context, a PNG file.")] = None,
) -> dict[str, Any]:
    """Time decoding, all cases in turns."""
    if steps % 10:
        raise ValueError(f"--steps must be a multiple of 10, so that strides of 10 come out even, not {steps}.")
    if (nothing := not_measured(device)) is not None:
        return nothing
    if tune:
        torch._inductor.config.coordinate_descent_tuning = True
    if threads is not None:
        torch.set_num_threads(threads)
    kind = "cuda" if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda") else "cpu"
    usual = USUAL[kind]
    dtype, k, rounds = dtype or usual.dtype, k or usual.k, rounds or usual.rounds
    if kind == "cuda" and model is None:
        shape = shape or "llama-3.1-8b"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 176)
    subject = subject_of(model, shape, dtype, device, policy)
    units, where = model_shape(subject.model), subject.model.device
    # A tuned policy has sets that it was tuned with, refreshes by keys and sizes per unit included.
    own = None if subject.selection is None else subject.selection.at_k(k)
    cases = [
        Case("generate"),
        Case("generate, static cache", static=True),
        Case("engine, every unit full", AlwaysFull()),
        Case("engine, stride 10", FixedStride(10)),
        Case("engine, stride 10, units in turn", staggered(*units.units, 10)),
        Case(f"engine, {subject.policy_name}", subject.policy, selection=own),
        # What deciding costs: asked like the policy, and never full.
        Case(f"engine, {subject.policy_name}, never full", BudgetConstrained(subject.policy, 0.0), selection=own),
        Case("engine, never full", NeverFull()),
    ]
    traffic, gb_per_s = Traffic.of(subject.model), best_read_gb_per_s(where)
    weights, token_bytes = traffic.weight_bytes, traffic.token_bytes
    machine = machine_name(where)
    console.print(f"{subject.name}, {dtype} on {where}, {torch.get_num_threads()} threads, {machine}")
    console.print(
        f"weights {weights / 1e6:.0f} MB read per step, {token_bytes} bytes per token of "
        f"cache, reading {gb_per_s:.1f} GB/s"
    )
    bench = Bench(subject.model, subject.tokens, k, steps)

    def floor_ms(n_tokens: float, batch: int) -> float:
        return traffic.floor_ms(n_tokens, batch, gb_per_s)

    def fits(context: int, batch: int) -> bool:
        if kind == "cpu":
            return batch == 1 or context <= 8000
        # A stock cache that grows is there twice for a moment, a layer at a time.
        return weights + 1.1 * batch * context * token_bytes < torch.cuda.get_device_properties(where).total_memory

    rows: list[dict[str, Any]] = []
    for batch, context in usual.pairs(batches, contexts):
        if not fits(context, batch):
            continue
        floors = {name: floor_ms(n, batch) for name, n in (("full", context), ("recycled", min(k, context)))}
        ideal = 0.1 * floors["full"] + 0.9 * floors["recycled"]
        console.print(
            f"\ncontext {context:,}, batch {batch}: floor {floors['full']:.1f} ms full, "
            f"{floors['recycled']:.1f} ms recycled, {ideal:.1f} ms at a tenth full"
        )
        dense_bytes = batch * (context + steps) * token_bytes
        rows += _time_cases(console, bench, cases, context, batch, k, rounds, floor_ms, dense_bytes)
        for row in rows[-len(cases) - 1 :]:
            row |= {"device": where.type, "dtype": dtype}
    books = None
    if where.type == "cpu":
        never_full = next(case for case in cases if case.name == f"engine, {subject.policy_name}, never full")
        books = round(bookkeeping_share(bench, never_full, 8000), 4)
        console.print(f"decisions and bookkeeping: {books:.1%} of a recycled step of the {subject.policy_name}")
    if llama is not None:
        rows += LlamaTimes.read(llama).rows(rows)
    _print(console, rows)
    # They were set for that shape.
    reached = on_h200(rows) if rows and where.type == "cuda" and shape == "llama-3.1-8b" else []
    for target in reached:
        console.print(f"{'met' if target['met'] else 'MISSED'}: {target['target']}: {target['reached']}")
    if picture is not None:
        draw(rows, picture, f"{subject.name}, {dtype}, {torch.get_num_threads()} threads, {machine}")
    return {
        "model": subject.name,
        "machine": machine,
        "measured": True,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": round(gb_per_s, 2),
        "weight_bytes": weights,
        "cache_bytes_per_token": token_bytes,
        "bookkeeping_share": books,
        "tuned_kernels": tune,
        "steps": steps,
        "rounds": rounds,
        "targets": reached,
        "versions": versions(),
        "rows": rows,
    }


def _time_cases(
    console: Console,
    bench: Bench,
    cases: list[Case],
    context: int,
    batch: int,
    k: int,
    rounds: int,
    floor_ms: Callable[[float, int], float],
    dense_bytes: int,
) -> list[dict[str, Any]]:
    """All cases in turns, and every unit full at a context of k; medians over rounds of what each round gives."""
    at_k = Case("engine, every unit full, context k", AlwaysFull())
    timed: dict[str, list[Timed]] = {case.name: [] for case in (*cases, at_k)}
    for case in (*cases, at_k):
        with _progress(console, f"warm-up: {case.name}"):  # Kernels are compiled in it.
            # transformers compiles for a static cache of each size.
            bench.time(case, context if case.static else k, batch)
    for turn in range(1, rounds + 1):
        for case in (*cases, at_k):
            with _progress(console, f"round {turn} of {rounds}: {case.name}"):
                timed[case.name].append(bench.time(case, k if case is at_k else context, batch))
    rows = []
    for case in (*cases, at_k):
        tokens = context if case is not at_k else k
        share, read = timed[case.name][0].full_share, timed[case.name][0].tokens_read
        references = zip(timed["engine, every unit full"], timed[at_k.name], strict=True)
        ideal_ms = [share * full.step_ms + (1 - share) * small.step_ms for full, small in references]
        ideal = [best / one.step_ms for best, one in zip(ideal_ms, timed[case.name], strict=True)]
        against = [stock.step_ms / one.step_ms for one, stock in zip(timed[case.name], timed["generate"], strict=True)]
        stocks = zip(*(timed[stock.name] for stock in cases if stock.policy is None), strict=True)
        fastest = [min(stock.step_ms for stock in of_round) for of_round in stocks]
        beside_fastest = [stock_ms / one.step_ms for one, stock_ms in zip(timed[case.name], fastest, strict=True)]
        peak_bytes = max(one.peak_bytes for one in timed[case.name])
        step_ms = statistics.median(one.step_ms for one in timed[case.name])
        rows.append(
            {
                "engine": timed[case.name][0].engine,
                "case": case.name,
                "context_tokens": tokens,
                "beside_context_tokens": context,
                "batch": batch,
                "k": k,
                "full_share": round(float(share), 4),
                "step_ms": round(step_ms, 3),
                "tokens_per_s": round(1e3 * batch / step_ms, 2),
                "ideal_share": round(statistics.median(ideal), 4) if case.policy is not None else None,
                "floor_share": round(floor_ms(read, batch) / step_ms, 4),
                "vs_generate": round(statistics.median(against), 3) if case is not at_k else None,
                "vs_best_stock": round(statistics.median(beside_fastest), 3) if case is not at_k else None,
                "peak_share": round(peak_bytes / dense_bytes, 4) if peak_bytes and case is not at_k else None,
            }
        )
    return rows


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    names = ("case", "context_tokens", "batch", "full_share", "step_ms", "tokens_per_s")
    of_row = ("ideal_share", "floor_share", "vs_generate", "vs_best_stock", "peak_share")
    for name in (*names, *of_row):
        table.add_column(name.replace("_", " "), justify="left" if name == "case" else "right")
    for row in rows:
        shares = [row.get(name) for name in of_row]
        table.add_row(*(str(row[name]) for name in names), *("-" if x is None else f"{x:.2f}" for x in shares))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
