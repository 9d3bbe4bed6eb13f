"""`python benchmarks/borrowing.py --results results`: what would units gain by taking sets of others?

A unit whose donor looks at this step could take the donor's new set, of its own size, for a gather of k tokens and no
reading of the cache (Kascade, arXiv 2512.16391, lives on it). The oracle: on the traces of `python -m tuning.optimize`,
what a unit would lose over sets of every other unit of the same or an earlier layer, donors being those who look often
anyway; the budget is divided again with borrowing as a way that costs nothing. Donors are found on tuning prompts, and
judged on held-out ones. Prints one JSON line; `docs/LOG.md` has what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from policies import Selection
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import model_shape
from recycler.record.one_prompt import heads_at_once, n_voters, traced_prompt
from recycler.record.step_attention import StepAttention, watch_steps
from recycler.sets.recycled_set import select
from traces import TraceFile, TraceFolder
from traces.reporting.command import run_command
from traces.sensitivity import Sensitivity
from tuning.divide.allocation import STRIDES, allocate, loss_by_stride
from tuning.divide.tuning_data import unit_cost
from tuning.replay.trace_batch import TraceBatch
from tuning.search.split import split_by_prompt

_ROWS_APART = 16
# Looks per step of a donor, at least.
_DONOR_RATE = 0.5


def main(
    results: Annotated[Path, typer.Option(help="Output folder of tuning.optimize.")] = Path("results"),
    budget: Annotated[float, typer.Option(help="Share of unit-steps that may run full.")] = 0.1,
) -> dict[str, Any]:
    """Say how much less is lost, at equal reading, if units may borrow."""
    loaded = load_model(None)
    split = split_by_prompt(list(TraceFolder(results / "traces")))
    learn, judge = TraceBatch(split.tune), TraceBatch(split.held_out)
    (measured_in,) = (results / "set_sizes").iterdir()
    cost = unit_cost(learn, Sensitivity.read(measured_in)).ravel()
    lost = {name: _over_sets_of(loaded, files) for name, files in (("learn", split.ablate), ("judge", split.held_out))}

    curves = {name: _curves(batch, cost) for name, batch in (("learn", learn), ("judge", judge))}
    rates = allocate(curves["learn"], budget)
    n_units = len(rates)
    alone = _at_rates(curves["judge"], rates)
    donors = np.flatnonzero(rates >= _DONOR_RATE)
    _, kv_heads = learn.units
    earlier = np.arange(n_units)[:, None] // kv_heads >= donors[None, :] // kv_heads
    earlier &= np.arange(n_units)[:, None] != donors[None, :]
    over = {name: np.where(earlier, table[:, donors], np.inf) * cost[:, None] for name, table in lost.items()}
    best = over["learn"].argmin(1)
    units = np.arange(n_units)
    # A unit that may borrow has that as a stride that costs nothing, in the place of "never"; donors keep their looks.
    mixed = curves["learn"].copy()
    may = ~np.isin(units, donors)
    mixed[-1, may] = np.minimum(mixed[-1, may], over["learn"][units, best][may])
    # Loss must fall with the rate: whoever borrows loses no more at any stride.
    mixed = np.minimum(mixed, mixed[-1])
    mixed_rates = allocate(mixed, budget)
    judged = curves["judge"].copy()
    borrows = may & (mixed[-1] < curves["learn"][-1])
    borrowed = over["judge"][units, best]
    judged[:, borrows] = np.where(
        mixed[:, borrows] < curves["learn"][:, borrows], borrowed[borrows], curves["judge"][:, borrows]
    )
    together = _at_rates(judged, mixed_rates)
    return {
        "donors": len(donors),
        "units that would borrow": int(borrows.sum()),
        "lost alone": round(float(alone.mean()), 5),
        "lost with borrowing": round(float(together.mean()), 5),
        "ratio": round(float(together.mean() / alone.mean()), 3),
        "over own new set, over best donor's (median of units)": [
            round(float(np.median(values)), 4)
            for values in (np.diag(lost["judge"]), np.where(earlier, lost["judge"][:, donors], np.inf).min(1))
        ],
        "over best set of any earlier unit (median of units)": round(
            float(np.median(_best_of_any(lost["judge"], kv_heads))), 4
        ),
    }


def _curves(traces: TraceBatch, cost: np.ndarray) -> np.ndarray:
    """Loss by stride and unit."""
    by_age = traces.lost_by_age.mean(0)
    recorded = by_age[~np.isnan(by_age).any((1, 2))]
    since_prompt = traces.lost_since_prompt.mean(0)
    return loss_by_stride(recorded, since_prompt).reshape(len(STRIDES), -1) * cost


def _at_rates(curves: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """What units lose at rates between those of `STRIDES`."""
    known = 1 / STRIDES[::-1].astype(float)
    return np.array([np.interp(rate, known, curves[::-1, unit]) for unit, rate in enumerate(rates)])


def _best_of_any(lost: np.ndarray, kv_heads: int) -> np.ndarray:
    layer = np.arange(len(lost)) // kv_heads
    allowed = (layer[:, None] >= layer[None]) & ~np.eye(len(lost), dtype=bool)
    return np.where(allowed, lost, np.inf).min(1)


def _over_sets_of(loaded: LoadedModel, files: Sequence[TraceFile]) -> np.ndarray:
    """Mass that each unit misses over the new set of each, of its own size: `(units, units)`, mean over steps."""
    return np.mean([_of_prompt(loaded, file) for file in files], axis=0)


def _of_prompt(loaded: LoadedModel, file: TraceFile) -> np.ndarray:
    selection, prompt = Selection(**file.header.selection), traced_prompt(file)
    shape = model_shape(loaded.model, loaded.id)
    sizes = np.full(shape.units, selection.k if selection.unit_k is None else selection.unit_k)
    weights: list[torch.Tensor] = []
    orders: list[torch.Tensor] = []

    def watch(layer: int, heads: slice, attention: StepAttention) -> None:
        rows = torch.arange(1, attention.query.shape[2], _ROWS_APART)
        weights.append(attention.weights[:, :, rows].mean(1))
        widest = torch.full((len(rows), 1), int(sizes.max()))
        # The largest set of every unit, sorted, so that a smaller one is its beginning.
        scores = attention.scores(selection)[:, rows]
        orders.append(select(scores, selection, 0, attention.ends[rows], widest).positions)

    watch_steps(
        loaded.model,
        prompt,
        watch,
        n_voters=n_voters(prompt, selection),
        n_heads=heads_at_once(loaded.model, prompt, selection, 1024),
        chunk_tokens=None,
    )
    attention, order = torch.cat(weights), torch.cat(orders)
    lost = np.empty((len(attention), len(attention)))
    for unit, size in enumerate(sizes.ravel().tolist()):
        held = attention[unit].expand(len(order), -1, -1).gather(-1, order[..., :size].clamp(min=0))
        lost[unit] = 1 - held.masked_fill(order[..., :size] < 0, 0).sum(-1).mean(-1).numpy()
    return lost


if __name__ == "__main__":
    run_command(main)
