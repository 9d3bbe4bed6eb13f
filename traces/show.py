"""Command: summarise a folder of traces in a table and in pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import written_by
from traces.pictures import draw_overlap, draw_recovered_mass, draw_similarity, write_picture
from traces.reporting.command import run_command
from traces.summary import Summary, doubling_ages, summarise
from traces.trace_file import TraceFolder

QUANTITIES = {
    "recovered_mass": "Recovered mass (share of attention)",
    "overlap": "Overlap (share of the new set)",
    "query_similarity": "Query similarity (cosine)",
}


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of traces, as python -m recycler.record writes it.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; FOLDER/pictures when not given.")] = None,
    age: Annotated[
        int | None, typer.Option(min=1, help="Age of the map of layers and heads, in steps; 16 or the oldest.")
    ] = None,
) -> dict[str, Any]:
    """Show what traces hold: a table by kind of text and age, and three pictures."""
    files = TraceFolder(folder)
    header = files[0].header
    model, k = str(header.model["id"]), header.selection["k"]
    out = folder / "pictures" if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write pictures to {out}: {error.strerror}.") from error

    # One at a time: a folder of traces may be larger than memory.
    progress = tqdm(files, desc="reading", unit="trace", disable=len(files) < 8)
    overall, by_kind = summarise(file.load() for file in progress)

    caption = f"{model}, k = {k} tokens, traces: {overall.n_traces:,}, steps: {overall.n_steps:,}"
    map_age = min(16, overall.max_age) if age is None else age
    figures = {
        "recovered-mass.png": draw_recovered_mass(overall, by_kind, caption, map_age),
        "query-similarity.png": draw_similarity(overall, caption),
        "overlap.png": draw_overlap(overall, by_kind, caption),
    }
    pictures = [write_picture(figure, out / name) for name, figure in figures.items()]

    # Piped, the tables keep one width; a terminal has its own.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    for table in _tables(overall, by_kind):
        console.print(table)

    mass = overall.by_age("recovered_mass")
    layers, kv_heads = overall.units
    return {
        "traces": overall.n_traces,
        "steps": overall.n_steps,
        "max_age": overall.max_age,
        "layers": layers,
        "kv_heads": kv_heads,
        "model": model,
        "k": k,
        "recovered_mass": {str(age): _plain(mass[overall.ages.index(age)]) for age in doubling_ages(overall.max_age)},
        "pictures": [str(picture) for picture in pictures],
    }


def _tables(overall: Summary, by_kind: Mapping[str, Summary]) -> list[Table]:
    rows = dict(by_kind) if len(by_kind) == 1 else {**by_kind, "all": overall}
    contents = _table("Traces", ["traces", "prompt tokens", "steps", "NLL (nats/token)"])
    for kind, summary in rows.items():
        counts = (summary.n_traces, summary.n_prompt_tokens, summary.n_steps)
        contents.add_row(Text(kind), *(f"{count:,}" for count in counts), _number(summary.nll_per_token))
    tables = [contents]
    ages = doubling_ages(overall.max_age)
    for name, title in QUANTITIES.items():
        fresh = name == "recovered_mass"
        table = _table(f"{title} by age in steps", (["0"] if fresh else []) + [str(age) for age in ages])
        for kind, summary in rows.items():
            means = summary.by_age(name)
            values = ([summary.mean_fresh_mass] if fresh else []) + [
                float(means[summary.ages.index(age)]) if age in summary.ages else math.nan for age in ages
            ]
            table.add_row(Text(kind), *(_number(value) for value in values))
        tables.append(table)
    return tables


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", min_width=4, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


if __name__ == "__main__":
    run_command(main, version=written_by())
