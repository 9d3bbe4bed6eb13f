"""`python benchmarks/left_out.py`: does a policy hold on a kind of text that its tuning never saw?

Each kind is left out in turn: sizes of sets, division of the budget and thresholds come from the others, and prompts of
it decode. They are those of `benchmarks/long_outputs.py`, whose JSON file has what stride 10 and the policy that was
tuned on all kinds do on them.
Sensitivities and losses by size are those of `python -m tuning.optimize`, whose output folder is given, measured if it
has none.
Everything is kept in the output folder as it comes. Writes `docs/results/left-out.json` and a section of
`docs/long_outputs.md`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from long_outputs_report import page
from machine import machine_name

from policies import Selection
from recycler.measure.ablation import measure_prompt_sensitivity
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import load_model
from recycler.prompts import KINDS, default_prompts
from recycler.record.folder import record_prompts
from recycler.record.size_losses import measure_size_losses
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from tuning.divide.set_sizes import size_sets
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.replay.trace_batch import TraceBatch
from tuning.search.split import split_by_prompt
from tuning.search.study import search_family

_RESULTS = Path(__file__).parents[1] / "docs" / "results"
_BUDGET = 0.1
_K = 128


def main(
    results: Annotated[Path, typer.Option(help="Output folder of tuning.optimize.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/left_out"),
    family: Annotated[str, typer.Option(help="Family that is tuned.")] = "cosine_profile",
    kinds: Annotated[str, typer.Option(help="To leave out in turn, separated by commas.")] = ",".join(KINDS),
    per_kind: Annotated[int, typer.Option(help="Unseen prompts, as in long_outputs.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Decode steps.", min=8)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
) -> dict[str, Any]:
    """Leave out each kind in turn, and decode it."""
    began = time.perf_counter()
    loaded = load_model(None)
    sizes = {"context_tokens": context_tokens, "n_steps": steps}
    split = split_by_prompt(default_prompts(loaded.tokenizer, n_per_kind=4, **sizes))
    selection = Selection.unpooled(_K)
    damage = measure_prompt_sensitivity(loaded, results / "set_sizes", split.ablate, selection)
    losses = measure_size_losses(loaded, split.tune, selection, results / "set_sizes")
    measured = json.loads((_RESULTS / "long-outputs.json").read_text(encoding="utf-8"))
    if [measured[name] for name in ("steps", "context_tokens", "k")] != [steps, context_tokens, _K]:
        raise ValueError("long-outputs.json is of other sizes: run benchmarks/long_outputs.py with these first.")
    store = ClosedLoopStore(out / "closed_loop")
    rows: dict[str, dict[str, float]] = {}
    for kind in kinds.split(","):
        seen = [prompt for prompt in split.tune if prompt.kind != kind]
        names = {prompt.name for prompt in seen}
        sized = size_sets(
            selection,
            dataclasses.replace(losses, lost={name: lost for name, lost in losses.lost.items() if name in names}),
            dataclasses.replace(damage, kl={name: kl for name, kl in damage.kl.items() if name in names}),
        )
        files = record_prompts(loaded, seen, sized.selection, out / f"without-{kind}", max_age=steps)
        search = search_family(
            FAMILIES[family],
            TuningData(TraceBatch(files), _BUDGET, sized.unit_cost),
            n_trials=40,
            n_candidates=1,
            seed=0,
            storage=None,
            study_name=kind,
        )
        unseen = default_prompts(loaded.tokenizer, n_per_kind=per_kind, first_index=4, kinds=[kind], **sizes)
        loops = store.run_all(loaded, unseen, [search.candidates[0].policy], sized.selection, desc=kind)
        of_kind = {name: row["kinds"][kind]["kl"] for name, row in measured["rows"].items()}
        rows[kind] = {
            "tuned without it": float(np.mean([loop.kl.mean() for loop in loops])),
            "full share": float(np.mean([loop.full.mean() for loop in loops])),
            "tuned with it": of_kind["tuned on 512 steps"],
            "stride 10": min(kl for name, kl in of_kind.items() if name.startswith("stride 10")),
        }
        print(f"{kind}: {json.dumps(rows[kind])}", flush=True)
        write_text(out / "left-out.json", json.dumps(rows))
    result = {"model": loaded.id, "machine": machine_name(), "family": family, "per_kind": per_kind, **sizes}
    if set(rows) == set(KINDS):
        write_text(_RESULTS / "left-out.json", json.dumps({**result, "kinds": rows}, indent=1) + "\n")
        write_text(_RESULTS.parent / "long_outputs.md", page(_RESULTS))
    return {
        "minutes": round((time.perf_counter() - began) / 60, 1),
        **{kind: round(row["tuned without it"] / row["stride 10"], 3) for kind, row in rows.items()},
    }


if __name__ == "__main__":
    run_command(main)
