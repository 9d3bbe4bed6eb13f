"""`python -m recycler.evaluate --policy policy.json`: a policy against full attention and against its competitors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from policies import PolicyFile, written_by
from recycler.evaluate.comparison import Comparison, check_lengths, compare
from recycler.evaluate.competitors import competitors, under_test
from recycler.evaluate.method import Method
from recycler.evaluate.pictures import draw_curves, draw_pareto, draw_ranking
from recycler.evaluate.summary import ALL_TASKS, curves, kl_shares, rows_to_json, summarise
from recycler.evaluate.table import share_table, source_table, tables
from recycler.measure.store import Store
from recycler.model.loading import load_model
from recycler.model.shape import model_shape
from recycler.model.versions import versions
from recycler.tasks import TASKS, task_prompts
from traces.pictures import write_picture
from traces.reporting.command import run_command
from traces.reporting.folder_lock import folder_locked
from traces.reporting.whole_file import write_text

# Shown along the continuation, beside the policies under evaluation.
_CURVES = ("streaming_llm", "snapkv", "quest", "refreshkv_s10", "refreshkv_s10_our_set", "fresh_top_k_ceiling")


def main(
    policy: Annotated[list[Path], typer.Option(help="Policy JSON; repeat the option for several.")],
    tasks: Annotated[str, typer.Option(help=f"Tasks, separated by commas; default: all of {', '.join(TASKS)}.")] = "",
    methods: Annotated[
        str, typer.Option(help="Baselines to compare with, separated by commas; default: all; 'none' for none.")
    ] = "",
    prompts: Annotated[int, typer.Option(help="Prompts per task.", min=1)] = 4,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 2048,
    steps: Annotated[int, typer.Option(help="Decode steps of natural texts and long answers.", min=2)] = 64,
    first_index: Annotated[
        int, typer.Option(help="Index of the first prompt of each task; those before are for tuning.", min=0)
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of what is drawn in the tasks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for outcomes, tables and pictures.")] = Path("results/fidelity"),
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder; default: the model of the policy.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
) -> dict[str, Any]:
    """Measure policies against full attention and other methods, at equal set size, on tasks the model can do."""
    files = [PolicyFile.read(path) for path in policy]
    names = _named(tasks) or list(TASKS)
    loaded = load_model(files[0].model.id if model is None else model, dtype=dtype, device=device)
    shape = model_shape(loaded.model, loaded.id)
    for file in files:
        file.check_model(shape)
    k = files[0].selection.k
    tested = under_test(policy, files)
    todo = task_prompts(
        loaded.tokenizer,
        names,
        n_prompts=prompts,
        context_tokens=context_tokens,
        n_steps=steps,
        seed=seed,
        first_index=first_index,
    )
    check_lengths(loaded, todo)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write results to {out}: {error.strerror}.") from error
    with folder_locked(out):
        rivals = competitors(loaded, shape, files[0], _named(methods), out, context_tokens, steps, seed)
        comparison = compare(loaded, todo, [*rivals, *tested], Store(out / "outcomes"))
        return report(comparison, loaded.id, k, context_tokens, rivals, tested, out)


def report(
    comparison: Comparison,
    model_id: str,
    k: int,
    context_tokens: int,
    rivals: Sequence[Method],
    tested: Sequence[Method],
    out: Path,
) -> dict[str, Any]:
    """Write tables, pictures and `results.json`, and print the tables; the last line of the command.

    Args:
        comparison: What came out.
        model_id: Name of the model.
        k: Tokens of a set.
        context_tokens: Prompt tokens.
        rivals: The baselines.
        tested: The methods that stand out in the pictures.
        out: Folder.
    """
    rows = summarise(comparison.outcomes)
    console = Console(highlight=False, width=None if os.isatty(1) else 160)
    named = [method.name for method in tested]
    found = tables(rows, comparison.screened)
    if rivals:
        found += [share_table(name, kl_shares(comparison.outcomes, name)) for name in named]
    for table in found:
        table.print(console)
    sources = source_table([*rivals, *tested])
    n_prompts = sum(len(outcome.methods) > 1 for outcome in comparison.outcomes)
    caption = f"{model_id}, k = {k} tokens, {context_tokens:,} tokens of context, {n_prompts} prompts"
    by_step = curves(comparison.outcomes, list(dict.fromkeys(row.method for row in rows)))
    if any(row.task == ALL_TASKS for row in rows):
        write_picture(draw_ranking(rows, named, caption), out / "ranking.png")
        write_picture(draw_pareto(rows, named, caption), out / "pareto.png")
    write_picture(draw_curves(by_step, [*named, *_CURVES], caption), out / "curves.png")
    last_line = {"model": model_id, "k": k, "context_tokens": context_tokens, "rows": rows_to_json(rows)}
    everything = {
        **last_line,
        "methods": {method.name: {"source": method.source, **method.settings()} for method in (*rivals, *tested)},
        "screened": [asdict(one) for one in comparison.screened],
        "curves": {
            task: {name: [round(value, 5) for value in values] for name, values in methods.items()}
            for task, methods in by_step.items()
        },
        "versions": versions(),
    }
    write_text(out / "results.json", json.dumps(everything))
    write_text(
        out / "tables.md",
        "\n\n".join(f"### {table.title}\n\n{table.to_markdown()}" for table in (*found, sources)) + "\n",
    )
    return last_line


def _named(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


if __name__ == "__main__":
    run_command(main, version=written_by())
