"""Outcomes of many prompts put together: means with intervals, and curves along the continuation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from recycler.evaluate.outcome import Outcome, PromptOutcome
from traces.reporting.estimate import Estimate, bootstrap, bootstrap_ratio

ALL_TASKS = "all"
# Full attention must do at least this much better than guessing for a task to tell methods apart.
CAN_DO_MARGIN = 0.25
# Probability, in each of ten thousand resamples, to draw only prompts on which full attention scores nothing.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Row:
    """One number of the comparison.

    Attributes:
        method: Name of the method.
        task: Name of the task, or `all` for the mean over prompts of all tasks that are compared.
        measure: `kl` (nats per step), the same by `kl_quarter_1` to `kl_quarter_4` of the continuation, its 95th
            percentile over the steps of a prompt (`kl_p95`), the share of steps beyond 1 nat (`above_1_nat`),
            `agreement` (share of steps), `nll_change` (nats per token), `full_share`, `read_share`, all teacher-forced;
            `accuracy` (mean score of the model's own answers) or `accuracy_kept` (the
            same as a share of full attention's).
        value: Mean over prompts.
        low: Lower end of the 95% bootstrap interval over prompts.
        high: Upper end.
        full_share: Share of unit-steps that attended to the whole cache, a keys-only refresh counted half, in the runs
            that the value is of.
        read_share: Tokens read of the cache in these runs, as a share of what full attention reads.
    """

    method: str
    task: str
    measure: str
    value: float
    low: float
    high: float
    full_share: float
    read_share: float


_SHARES = ("full_share", "read_share")


def _quarter(i: int, outcome: Outcome) -> np.ndarray:
    """KL in a part of the continuation; empty where it is too short to have four."""
    return np.array_split(outcome.kl, 4)[i] if len(outcome.kl) >= 4 else outcome.kl[:0]


QUARTERS = tuple(f"kl_quarter_{i}" for i in (1, 2, 3, 4))
_FORCED: Mapping[str, Callable[[Outcome], np.ndarray]] = {
    "kl": lambda outcome: outcome.kl,
    **{name: partial(_quarter, i) for i, name in enumerate(QUARTERS)},
    "kl_p95": lambda outcome: np.quantile(outcome.kl, [0.95]) if len(outcome.kl) else outcome.kl,
    "above_1_nat": lambda outcome: outcome.kl > 1,
    "agreement": lambda outcome: outcome.agreement,
    "nll_change": lambda outcome: outcome.nll_change,
    "full_share": lambda outcome: np.array([outcome.full_share]),
    "read_share": lambda outcome: np.array([outcome.read_share]),
}


def can_do(outcomes: Sequence[PromptOutcome], chance: float) -> bool:
    """Whether full attention does a task well enough to compare methods on it; True where nothing is answered."""
    scores = [outcome.methods["full"].score for outcome in outcomes]
    known = [score for score in scores if score is not None]
    return not known or float(np.mean(known)) >= chance + CAN_DO_MARGIN


def summarise(outcomes: Sequence[PromptOutcome]) -> list[Row]:
    """Rows of every method, task and measure.

    Args:
        outcomes: Prompts of all tasks; a method that is missing on some of a task's prompts is left out of that task,
            and `all` is over the tasks that every method ran on.
    """
    by_task: dict[str, list[PromptOutcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.methods))
    compared = [outcome for outcome in outcomes if len(outcome.methods) == len(names)]
    groups = {**by_task, **({ALL_TASKS: compared} if len({outcome.task for outcome in compared}) > 1 else {})}
    return [
        row
        for task, prompts in groups.items()
        for name in names
        if all(name in prompt.methods for prompt in prompts)
        for row in _rows(name, task, prompts)
    ]


def kl_shares(outcomes: Sequence[PromptOutcome], method: str) -> dict[str, Estimate]:
    """KL of a method as a share of every other's, over the prompts that both ran on, resampled together.

    Full attention, whose KL is rounding, is left out.
    """
    found: dict[str, Estimate] = {}
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.methods):
        both = [outcome.methods for outcome in outcomes if method in outcome.methods and name in outcome.methods]
        if both and name not in ("full", method):
            ours, theirs = (np.array([one[which].kl.mean() for one in both]) for which in (method, name))
            # Where sets hold the whole context, both are rounding.
            if theirs.min() > 0:
                found[name] = bootstrap_ratio(ours, theirs)
    return found


def curves(outcomes: Sequence[PromptOutcome], methods: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Mean KL at each step, by task and method, over the steps that all prompts of a task have."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        prompts = [outcome for outcome in outcomes if outcome.task == task]
        n_steps = min(len(prompt.methods["full"].kl) for prompt in prompts)
        found[task] = {
            name: np.mean([prompt.methods[name].kl[:n_steps] for prompt in prompts], axis=0).tolist()
            for name in methods
            if all(name in prompt.methods for prompt in prompts)
        }
    return found


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain JSON values, rounded to six digits."""
    return [
        {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    ]


def _rows(name: str, task: str, prompts: Sequence[PromptOutcome]) -> list[Row]:
    outcomes = [prompt.methods[name] for prompt in prompts]
    full_share, read_share = (float(np.mean([getattr(one, part) for one in outcomes])) for part in _SHARES)
    rows = []
    for measure, values in _FORCED.items():
        means = [values(one).mean() for one in outcomes if len(values(one))]
        if means:
            rows.append(_row(name, task, measure, bootstrap(np.array(means)), full_share, read_share))
    answered = [place for place, one in enumerate(outcomes) if one.score is not None]
    if not answered:
        return rows
    own = [outcomes[place] for place in answered]
    full_share, read_share = (float(np.mean([getattr(one, f"answer_{part}") for one in own])) for part in _SHARES)
    scores = np.array([one.score for one in own], dtype=np.float64)
    rows.append(_row(name, task, "accuracy", bootstrap(scores), full_share, read_share))
    reference = np.array([prompts[place].methods["full"].score for place in answered], dtype=np.float64)
    # A ratio of resampled means needs a full attention that scores in every resample.
    if reference.min() > 0 or (task == ALL_TASKS and (reference == 0).mean() ** len(reference) < _NEGLIGIBLE):
        rows.append(_row(name, task, "accuracy_kept", bootstrap_ratio(scores, reference), full_share, read_share))
    return rows


def _row(method: str, task: str, measure: str, estimate: Estimate, full_share: float, read_share: float) -> Row:
    return Row(method, task, measure, estimate.value, estimate.low, estimate.high, full_share, read_share)
