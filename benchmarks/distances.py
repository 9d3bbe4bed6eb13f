"""`python benchmarks/distances.py`: is a unit as harmless far behind the prompt as it is near it?

`python -m tuning.optimize` asks what a unit does to the model by letting it keep the prompt's set for 24 steps while
all others run full. Here it keeps it for as many as an output has, and its damage is taken near the prompt and at
several distances: what units do in sum, how alike their orders are (Spearman), and whether the worst are the same.
Every run is kept in the output folder as it comes. Writes `docs/results/distances.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import machine_name
from scipy.stats import spearmanr

from policies import PolicyFile
from recycler.measure.ablation import one_never_looks
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import load_model
from recycler.model.shape import model_shape
from recycler.prompts import default_prompts
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_ROOT = Path(__file__).parents[1]
# Steps over which damage is a mean, as in tuning.
_WINDOW = 24


def main(
    policy: Annotated[Path, typer.Option(help="Policy file: its selection chooses the sets.")] = _ROOT
    / "docs/results/policy-budget-0.1-512-steps.json",
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/distances"),
    kinds: Annotated[str, typer.Option(help="Of text, by commas; a prompt of each.")] = "prose,copying,key_values",
    steps: Annotated[int, typer.Option(help="Decode steps.", min=2 * _WINDOW)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
) -> dict[str, Any]:
    """Measure every unit's damage at several distances from the prompt."""
    began = time.perf_counter()
    loaded, selection = load_model(None), PolicyFile.read(policy).selection
    alone = one_never_looks(model_shape(loaded.model).units)
    # The first of each kind, on which tuning measures damage.
    prompts = default_prompts(
        loaded.tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=steps, kinds=kinds.split(",")
    )
    loops = ClosedLoopStore(out).run_all(loaded, prompts, alone, selection, desc="one unit never looks")
    begins = np.linspace(0, steps - _WINDOW, 5).round().astype(int).tolist()
    # `(prompts, windows, units)`.
    kl = np.stack([[loop.kl[:, begin : begin + _WINDOW].mean(1) for begin in begins] for loop in loops])
    damage = dict(zip([f"{begin} to {begin + _WINDOW}" for begin in begins], kl.mean(0), strict=True))
    overall = np.mean([loop.kl.mean(1) for loop in loops], axis=0)
    result = {
        "model": loaded.id,
        "machine": machine_name(),
        "steps": steps,
        "context_tokens": context_tokens,
        "prompts": [prompt.name for prompt in prompts],
        "by_distance": {name: _row(table, damage, overall) for name, table in damage.items()},
        "damage": {name: table.round(7).tolist() for name, table in damage.items()},
        "overall": overall.round(7).tolist(),
    }
    write_text(_ROOT / "docs/results/distances.json", json.dumps(result, indent=1) + "\n")
    return {"minutes": round((time.perf_counter() - began) / 60, 1), **result["by_distance"]}


def _row(table: np.ndarray, damage: Mapping[str, np.ndarray], overall: np.ndarray) -> dict[str, float]:
    """Of damage at a distance: its sum, and how it goes with that near the prompt and over the whole output."""
    near = next(iter(damage.values()))
    worst = np.argsort(overall)[-len(overall) // 10 :]
    return {
        "sum of units, nats": round(float(table.sum()), 4),
        "rank correlation with near": round(float(spearmanr(near, table).statistic), 3),
        "rank correlation with the whole": round(float(spearmanr(overall, table).statistic), 3),
        "of the worst tenth of the whole, share in its own": round(
            float(np.isin(np.argsort(table)[-len(worst) :], worst).mean()), 3
        ),
    }


if __name__ == "__main__":
    run_command(main)
