"""`python benchmarks/timing_signals.py`: which signal that a decoder has tells what a unit loses at this step?

The kinds of `benchmarks/timing.py`, whose folder of traces is used if it is there. A regression learns, on half of the
prompts, to tell lost mass from what a decoder knows before it looks; on the others, units look where the forecast,
times what the unit costs, is above one threshold. With everything known that is the sensor of the present; with a
set's age alone it is a clock. What is between is what signals are worth. Writes
`benchmarks/results/timing-signals.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from machine import machine_name
from sklearn.ensemble import HistGradientBoostingRegressor
from timing_oracles import sensor, squared
from timing_traces import turning_traces
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from policies import PolicyFile
from recycler import load_model
from recycler.model.attention_hook import AttentionFunction, attention_replaced
from recycler.model.prefill import prefill
from recycler.model.shape import model_shape
from recycler.prompts import Prompt
from recycler.sets.scores import Scoring
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from tuning.divide.hindsight import follow_given
from tuning.replay.trace_batch import TraceBatch

_ROOT = Path(__file__).parents[1]
_BUDGET = 0.1
_N_THRESHOLDS = 24
# Of attention, where a logarithm or a quotient is taken of it.
_LEAST_MASS = 1e-6
# What is seen of a set before the unit looks. The first ones are those of today's policies.
_TODAY = ("unit", "age", "query_similarity", "step_similarity", "refresh_loss", "refresh_mass")
_NEW = {
    "fall of the set's own weight since its refresh": ("fall",),
    "share of the set's attention on sinks": ("sinks",),
    "agreement of the units that looked at the step before": ("agreement",),
}
FEATURES: Mapping[str, tuple[str, ...]] = {
    "age alone, by unit": ("unit", "age"),
    "what policies see today": _TODAY,
    **{f"and {name}": (*_TODAY, *more) for name, more in _NEW.items()},
    "all of them": (*_TODAY, *(one for more in _NEW.values() for one in more)),
}


@dataclass(frozen=True)
class Seen:
    """What one prompt's decoder would see, over `(steps, units)`, or `(steps, ages, units)` where sets are aged.

    Attributes:
        lost: Lost mass by age.
        similarity: Of queries, by age.
        fresh: Mass of a set chosen at each step; one row more, whose first is the prompt's.
        log_total: Logarithm of what the softmax divides by, mean over the group; one row more, as in `fresh`.
        sinks: Attention on the sinks.
    """

    lost: np.ndarray
    similarity: np.ndarray
    fresh: np.ndarray
    log_total: np.ndarray
    sinks: np.ndarray


def main(
    policy: Annotated[Path, typer.Option(help="Policy file whose sets are recorded.")] = _ROOT
    / "docs/results/policy-budget-0.1-512-steps.json",
    out: Annotated[Path, typer.Option(help="Folder of traces, as of benchmarks/timing.py.")] = Path("results/timing"),
    steps: Annotated[int, typer.Option(help="Decode steps.", min=64)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind; half of them are learned from.", min=2)] = 4,
) -> dict[str, Any]:
    """Say what each signal would be worth."""
    loaded, selection = load_model(None), PolicyFile.read(policy).selection
    traces = turning_traces(loaded, selection, out, steps=steps, context_tokens=context_tokens, per_kind=per_kind)
    cost = traces.unit_cost.ravel()
    learn, judge = (
        [_seen(loaded.model, batch, i, prompt, selection.sinks) for i, prompt in enumerate(tqdm(some, desc="reading"))]
        for batch, some in ((traces.learn, traces.learned), (traces.judge, traces.judged))
    )
    # Where units have been is what is learned from: first on the way of a clock, then on that of the first forecast.
    visited = _met(learn, cost, _by_age(learn))
    found = {}
    for name, features in FEATURES.items():
        rows = visited
        for _ in range(2):
            forecast = _learned(*rows, features)
            met = _met(learn, cost, forecast)
            rows = np.concatenate([visited[0], met[0]]), np.concatenate([visited[1], met[1]])
        found[name] = _judged(judge, cost, forecast)
        print(f"{name}: {found[name]['squared']:.5f} at {found[name]['full_share']:.1%}", flush=True)
    losses = [(one.lost * cost).astype(np.float32) for one in judge]
    sensed = [sensor(lost, _BUDGET) for lost in losses]
    found["sensor of the present"] = {
        "squared": squared(np.stack([follow_given(*both) for both in zip(losses, sensed, strict=True)])),
        "full_share": float(np.mean(sensed)),
    }
    result = {
        "model": loaded.id,
        "machine": machine_name(),
        "steps": steps,
        "context_tokens": context_tokens,
        "prompts_learned": len(learn),
        "prompts_judged": len(judge),
        "found": found,
    }
    write_text(_ROOT / "benchmarks/results/timing-signals.json", json.dumps(result, indent=1) + "\n")
    return result


def _seen(model: PreTrainedModel, batch: TraceBatch, trace: int, prompt: Prompt, n_sinks: int) -> Seen:
    log_total, sinks = _totals(model, prompt, n_sinks)
    by_age = {name: batch.at_all_ages(name, trace) for name in ("recovered_mass", "query_similarity")}
    return Seen(
        lost=np.nan_to_num(1 - by_age["recovered_mass"]).astype(np.float32),
        similarity=np.nan_to_num(by_age["query_similarity"]).astype(np.float32),
        fresh=batch.fresh_mass[:, trace].reshape(prompt.n_steps + 1, -1),
        log_total=log_total,
        sinks=sinks[1:],
    )


def _totals(model: PreTrainedModel, prompt: Prompt, n_sinks: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the prompt's last token and every step: logarithm of the softmax's sum, and attention on sinks; by unit."""
    shape, found = model_shape(model), []

    def watching(stock: AttentionFunction) -> AttentionFunction:
        def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            grouped, tokens = query[0].unflatten(0, (shape.kv_heads, -1)), key.shape[2]
            logits = Scoring.of_call(key, kwargs).logits(grouped @ key[0, :, None].transpose(-1, -2))
            first = tokens - query.shape[2]
            ahead = torch.arange(tokens) > first + torch.arange(query.shape[2])[:, None]
            total = logits.masked_fill_(ahead, float("-inf")).logsumexp(-1)
            on_sinks = (logits[..., :n_sinks] - total[..., None]).exp().sum(-1)
            found.append(torch.stack([total.mean(1), on_sinks.mean(1)]).numpy())
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    tokens = torch.as_tensor(prompt.tokens.astype(np.int64))[None]
    first = prompt.n_prompt_tokens - 1
    cache = prefill(model, tokens[:, :first], 4096)
    with torch.inference_mode(), attention_replaced(model, watching):
        model(tokens[:, first:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    # (layers, 2, heads, rows) to two of (rows, units).
    stacked = np.stack(found).transpose(1, 3, 0, 2)
    total, sinks = stacked.reshape(2, stacked.shape[1], -1)
    return total, sinks


# Of features `(n, features)`, and lost mass `(n,)` of each.
Forecast = Callable[[np.ndarray], np.ndarray]
_NAMES = (
    "unit",
    "age",
    "query_similarity",
    "step_similarity",
    "refresh_loss",
    "refresh_mass",
    "fall",
    "sinks",
    "agreement",
)


class _Step(NamedTuple):
    """A step of all prompts, `(thresholds, prompts, units)` each.

    Attributes:
        seen: float32 `(thresholds x prompts x units, features)`: what was known before, in the order of `_NAMES`.
        lost: Lost mass of the sets as they were.
        full: bool: who looks.
    """

    seen: np.ndarray
    lost: np.ndarray
    full: np.ndarray


def _walk(prompts: Sequence[Seen], cost: np.ndarray, forecast: Forecast, thresholds: np.ndarray) -> Iterator[_Step]:
    """All steps, where units look whose forecast loss, times cost, is above a threshold: at several at once."""
    n_steps, _, n_units = prompts[0].lost.shape
    shape = (len(thresholds), len(prompts), n_units)
    _, at_prompt, at_unit = np.indices(shape)
    similarity, losses, fresh_mass, log_total, sinks = (
        np.stack([getattr(one, name) for one in prompts])
        for name in ("similarity", "lost", "fresh", "log_total", "sinks")
    )
    age = np.ones(shape, dtype=np.intp)
    refresh_loss, surprise, full = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    for step in range(n_steps):
        lost = losses[at_prompt, step, age - 1, at_unit]
        mass = np.maximum(1 - lost, _LEAST_MASS)
        source = (at_prompt, step + 1 - age, at_unit)
        weight_then = log_total[source] + np.log(np.maximum(fresh_mass[source], _LEAST_MASS))
        weight_now = log_total[at_prompt, step + 1, at_unit] + np.log(mass)
        who_looked = cost * full
        agreement = (surprise * who_looked).sum(-1, keepdims=True) / np.maximum(
            who_looked.sum(-1, keepdims=True), _LEAST_MASS
        )
        features = (
            at_unit,
            age,
            similarity[at_prompt, step, age - 1, at_unit],
            similarity[at_prompt, step, 0, at_unit],
            refresh_loss,
            fresh_mass[source],
            weight_then - weight_now,
            sinks[at_prompt, step, at_unit] / mass,
            np.broadcast_to(agreement, shape),
        )
        seen = np.stack([np.asarray(feature, dtype=np.float32).ravel() for feature in features], axis=1)
        told = forecast(seen).reshape(shape)
        full = told * cost > thresholds[:, None, None]
        yield _Step(seen, lost, full)
        surprise = lost - told
        refresh_loss = np.where(full, lost, refresh_loss)
        age = np.where(full, 1, age + 1)


def _met(prompts: Sequence[Seen], cost: np.ndarray, forecast: Forecast) -> tuple[np.ndarray, np.ndarray]:
    """Features `(n, features)` and lost mass `(n,)` of a sixteenth of what is met at six thresholds."""
    draw, seen, lost = np.random.default_rng(0), [], []
    for step in _walk(prompts, cost, forecast, np.geomspace(3e-3, 1, 6)):
        kept = draw.choice(len(step.seen), len(step.seen) // 16, replace=False)
        seen.append(step.seen[kept])
        lost.append(step.lost.ravel()[kept])
    return np.concatenate(seen), np.concatenate(lost)


def _by_age(prompts: Sequence[Seen]) -> Forecast:
    """A forecast by unit and age: the mean over steps that have a set of that age."""
    lost = np.mean([one.lost for one in prompts], axis=0)
    n_steps = len(lost)
    old_enough = np.arange(n_steps)[:, None, None] >= np.arange(lost.shape[1])[None, :, None]
    mean = np.where(old_enough, lost, 0).sum(0) / old_enough.sum(0)
    return lambda seen: mean[seen[:, 1].astype(np.intp) - 1, seen[:, 0].astype(np.intp)]


def _learned(seen: np.ndarray, lost: np.ndarray, features: Sequence[str]) -> Forecast:
    columns = [_NAMES.index(name) for name in features]
    model = HistGradientBoostingRegressor(
        max_iter=150, max_leaf_nodes=63, learning_rate=0.15, categorical_features=[0], random_state=0
    )
    model.fit(seen[:, columns], lost)
    return lambda seen: model.predict(seen[:, columns])


def _judged(prompts: Sequence[Seen], cost: np.ndarray, forecast: Forecast) -> dict[str, float]:
    """At the lowest threshold that keeps the budget, found in two passes."""
    low, high = 1e-4, 10.0
    for _ in range(2):
        thresholds = np.geomspace(low, high, _N_THRESHOLDS)
        steps = [
            (step.full, np.where(step.full, 0, step.lost * cost)) for step in _walk(prompts, cost, forecast, thresholds)
        ]
        # (steps, thresholds, prompts, units)
        full, left = (np.stack(some) for some in zip(*steps, strict=True))
        kept = int(np.argmax(full.mean((0, 2, 3)) <= _BUDGET))
        low, high = thresholds[max(kept - 1, 0)], thresholds[kept]
    return {"squared": squared(left[:, kept]), "full_share": float(full[:, kept].mean())}


if __name__ == "__main__":
    run_command(main)
