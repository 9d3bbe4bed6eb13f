"""`python benchmarks/timing.py`: what is knowing *when* worth, on outputs whose need changes at moments no clock knows?

Prompts of `TURNING_KINDS` are recorded, half of them to learn from. On the others, at one budget: clocks per unit,
clocks of units who are told when the output turns, the same told by a detector, thresholds of similarity and a learned
logistic per unit, a sensor of the present loss, and hindsight; first in replay, then decoding. Everything is kept in
the output folder as it comes. Writes `docs/timing.md`, its picture and `docs/results/timing.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from foreseen import Foreseen
from machine import machine_name
from timing_oracles import (
    OFFSETS,
    Losses,
    Options,
    clocks_and_told,
    detected,
    of_policies,
    sensor,
    squared,
)
from timing_report import draw, report
from timing_traces import TurningTraces, turning_traces

from policies import CosineThreshold, FixedStride, PolicyFile, Selection, StepPolicy
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.measure.closed_loop import run_closed_loops
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.loading import LoadedModel, load_model
from recycler.prompts import TURNING_KINDS, Prompt
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from tuning.divide.allocation import STRIDES
from tuning.divide.hindsight import follow_given, hindsight
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.families.fit import fit_logistic
from tuning.families.logistic import shifted
from tuning.replay.trace_batch import TraceBatch
from tuning.search.study import search_family

_DOCS = Path(__file__).parents[1] / "docs"
_BUDGET = 0.1
# Of steps that a detector may take for events, and steps between two of them.
_DETECTED_SHARES = (0.02, 0.04, 0.08)
_LEAST_GAP = 6
_LOG_ODDS = np.linspace(-8, 8, 33)


def main(
    policy: Annotated[Path, typer.Option(help="Policy file whose sets are recorded, and which decodes too.")] = _DOCS
    / "results/policy-budget-0.1-512-steps.json",
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/timing"),
    steps: Annotated[int, typer.Option(help="Decode steps.", min=64)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind; half of them are learned from.", min=2)] = 4,
    trials: Annotated[int, typer.Option(help="Trials of each learned family.", min=1)] = 40,
) -> dict[str, Any]:
    """Say how much of what a schedule could gain by timing is gained."""
    began = time.perf_counter()
    loaded, file = load_model(None), PolicyFile.read(policy)
    selection = file.selection
    traces = turning_traces(loaded, selection, out, steps=steps, context_tokens=context_tokens, per_kind=per_kind)
    ends = sentence_end_tokens(loaded.tokenizer)
    replayed, schedules = _replay(traces, ends)
    tuned = {
        name: search_family(
            FAMILIES[name],
            TuningData(traces.learn, _BUDGET, traces.unit_cost),
            n_trials=trials,
            n_candidates=1,
            seed=0,
            storage=None,
            study_name=name,
        )
        .candidates[0]
        .policy
        for name in ("stride_profile", "cosine_profile", "logistic_profile")
    }
    same: Mapping[str, StepPolicy] = {
        "stride 10": FixedStride(1 / _BUDGET),
        "exported, tuned on other kinds": file.policy,
        **{f"{name}, tuned on these kinds": one for name, one in tuned.items()},
    }
    rows = _decode(Store(out / "decoded"), loaded, traces.judged, selection, schedules, same)
    result: dict[str, Any] = {
        "model": loaded.id,
        "machine": machine_name(),
        "steps": steps,
        "context_tokens": context_tokens,
        "kinds": list(TURNING_KINDS),
        "prompts_learned": len(traces.learned),
        "prompts_judged": len(traces.judged),
        "replayed": replayed,
        "decoded": rows,
    }
    document = report(result)
    draw(result).savefig(_DOCS / "pictures" / "timing.png", dpi=110)
    write_text(_DOCS / "results" / "timing.json", json.dumps(result))
    write_text(_DOCS / "timing.md", document)
    print(document)
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _replay(traces: TurningTraces, ends: Sequence[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """By schedule what it loses by kind, and full steps `(traces, steps, units)` of it at the budget over all kinds."""
    learn, judge, cost, prompts = traces.learn, traces.judge, traces.unit_cost, (traces.learned, traces.judged)
    losses = [Losses.of(some, cost) for some in (learn, judge)]
    events = [[prompt.events for prompt in some] for some in prompts]
    told = Options.of(*(clocks_and_told(*both) for both in zip(losses, events, strict=True)))
    n_clocks = len(STRIDES)
    choices = {"clocks per unit": told.among(range(n_clocks)), "told when the output turns": told}
    clock_full, _ = choices["clocks per unit"].best(_BUDGET)
    scouts = clock_full.mean((0, 1)) >= 0.25
    detectors = {name: (_signal(learn, name, scouts), _signal(judge, name, scouts)) for name in ("sets", "queries")}
    for name, signals in detectors.items():
        by_share = [
            Options.of(
                *(
                    clocks_and_told(some, [detected(signal, share, _LEAST_GAP) for signal in of_traces])
                    for some, of_traces in zip(losses, signals, strict=True)
                )
            )
            for share in _DETECTED_SHARES
        ]
        # What is seen at a step may be known to units at the next.
        seen = [n_clocks * row + i for row, at in enumerate(OFFSETS) if 0 not in at for i in range(n_clocks)]
        choices[f"told by a detector of {name}"] = _joined([one.among(seen) for one in by_share])
    ended = [
        [np.flatnonzero(np.isin(prompt.tokens[prompt.n_prompt_tokens :], list(ends))).tolist() for prompt in some]
        for some in prompts
    ]
    choices["told of ends of sentences and lines"] = Options.of(
        *(clocks_and_told(*both) for both in zip(losses, ended, strict=True))
    )
    similarity = [CosineThreshold(float(threshold)) for threshold in 1 - np.geomspace(0.002, 2, 40)]
    choices["similarity per unit"] = Options.of(*(of_policies(some, similarity, cost) for some in (learn, judge)))
    logistic = []
    for positive_share in (0.1, 0.2):
        fitted = fit_logistic(learn, cost, positive_share)
        logistic += [shifted(fitted, shift) for shift in _LOG_ODDS]
    choices["logistic per unit"] = Options.of(*(of_policies(some, logistic, cost) for some in (learn, judge)))

    kinds = np.array(judge.kinds)
    foreseen = hindsight(judge, cost, _BUDGET).swapaxes(0, 1).reshape(len(judge), judge.n_steps, -1)
    sensed = np.stack([sensor(lost, _BUDGET) for lost in losses[1].lost])
    known = {"sensor of the present": sensed, "hindsight": foreseen}
    replayed: dict[str, Any] = {
        name: {"all": _said(*options.best(_BUDGET))}
        | {kind: _said(*options.on(np.flatnonzero(kinds == kind)).best(_BUDGET)) for kind in dict.fromkeys(judge.kinds)}
        for name, options in choices.items()
    }
    for name, full in known.items():
        left = np.stack([follow_given(*both) for both in zip(losses[1].lost, full, strict=True)])
        replayed[name] = {"all": _said(full, left)} | {
            kind: _said(full[kinds == kind], left[kinds == kind]) for kind in dict.fromkeys(judge.kinds)
        }
    for name, (_, signals) in detectors.items():
        replayed[f"told by a detector of {name}"]["area_under_curve"] = _area(signals, events[1])
    return replayed, {name: options.best(_BUDGET)[0] for name, options in choices.items()} | known


def _joined(some: Sequence[Options]) -> Options:
    fields = [field.name for field in dataclasses.fields(Options)]
    return Options(*(np.concatenate([getattr(one, name) for one in some]) for name in fields))


def _said(full: np.ndarray, left: np.ndarray) -> dict[str, float]:
    return {"full_share": float(full.mean()), "lost": float(left.mean()), "squared": squared(left)}


def _signal(traces: TraceBatch, name: str, scouts: np.ndarray) -> list[np.ndarray]:
    """What a detector sees at each step, one array by trace.

    "sets": what is new in a set that is chosen at every step, in units that look often anyway. "queries": how far
    queries turn from one step to the next, in all units.
    """
    if name == "sets":
        return [1 - traces.of_trace("overlap", i)[:, 0][:, scouts].mean(1) for i in range(len(traces))]
    return [1 - traces.of_trace("query_similarity", i)[:, 0].mean(1) for i in range(len(traces))]


def _area(signals: Sequence[np.ndarray], events: Sequence[Sequence[int]]) -> float:
    """That a detector is higher at an event, or at one of the two steps after it, than at another step."""
    at, elsewhere = [], []
    for signal, some in zip(signals, events, strict=True):
        near = {step for event in some for step in range(event, min(event + 3, len(signal)))}
        at += [float(signal[event : event + 3].max()) for event in some]
        elsewhere += [float(value) for step, value in enumerate(signal) if step not in near]
    higher = np.searchsorted(np.sort(elsewhere), at) / len(elsewhere)
    return float(higher.mean())


def _decode(
    store: Store,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    selection: Selection,
    schedules: Mapping[str, np.ndarray],
    same: Mapping[str, StepPolicy],
) -> dict[str, Any]:
    """Decode the prompts by all schedules, which differ by prompt, and policies, which do not."""
    units = np.shape(selection.unit_k)
    by_name: dict[str, StepPolicy | Sequence[StepPolicy]] = {
        name: [Foreseen.of(one.reshape(-1, *units)) for one in full] for name, full in schedules.items()
    } | dict(same)

    def compute() -> dict[str, np.ndarray]:
        loops = run_closed_loops(
            loaded.model,
            [prompt.tokens for prompt in prompts],
            prompts[0].n_prompt_tokens,
            list(by_name.values()),
            selection,
            desc="decoding",
        )
        return {
            "kl": np.stack([loop.kl for loop in loops]),
            "full": np.stack([loop.full.mean((2, 3)) for loop in loops]),
            "read": np.stack([loop.read_share for loop in loops]),
        }

    depends_on = {
        "timing of": [digest_of_tokens(prompt.tokens) for prompt in prompts],
        "selection": selection.to_json(),
        "policies": {name: hashlib.sha256(repr(one).encode()).hexdigest() for name, one in by_name.items()},
    }
    # (prompts, policies, steps)
    found = store.get(loaded, depends_on, compute)
    kinds = np.array([prompt.kind for prompt in prompts])
    return {
        name: {
            "full_share": float(found["full"][:, row].mean()),
            "read_share": float(found["read"][:, row].mean()),
            "kl": float(found["kl"][:, row].mean()),
            "kinds": {kind: float(found["kl"][kinds == kind, row].mean()) for kind in dict.fromkeys(kinds.tolist())},
            "prompt_kl": found["kl"][:, row].mean(1).tolist(),
        }
        for row, name in enumerate(by_name)
    }


if __name__ == "__main__":
    run_command(main)
