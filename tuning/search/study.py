"""Searching one family with Optuna."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.study import MaxTrialsCallback
from optuna.trial import FixedTrial, TrialState, create_trial
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import StepPolicy
from policies.shown import sentence
from tuning.divide.tuning_data import TuningData
from tuning.families.family import Family
from tuning.replay.run import replay_policy
from tuning.search.shared_storage import shared_storage
from tuning.search.trial_digest import is_as_written, trial_attributes


@dataclass(frozen=True)
class Candidate:
    """A point of a family's search space that did well in replay.

    Attributes:
        parameters: The point.
        policy: Its policy.
        loss: Its replay loss.
    """

    parameters: dict[str, Any]
    policy: StepPolicy
    loss: float


@dataclass(frozen=True)
class Search:
    """What searching a family found.

    Attributes:
        family: Its name.
        candidates: The best few with different parameters, best first.
        trials: float64 `(trials, 2)`: full share and loss in replay of every trial.
    """

    family: str
    candidates: tuple[Candidate, ...]
    trials: np.ndarray


def search_family(
    family: Family,
    data: TuningData,
    *,
    n_trials: int,
    n_candidates: int,
    seed: int,
    storage: BaseStorage | str | None,
    study_name: str,
) -> Search:
    """Minimise the replay loss over a family's search space.

    A storage in a URL is shared: a study of the same name in it is continued until it has `n_trials` complete trials,
    and several processes may work on it at once. Any other storage is that of one process: the search goes on where it
    was, so that one that was interrupted ends as if it had not been.

    Args:
        family: What to search.
        data: What to tune on.
        n_trials: Complete trials wanted, at least 1.
        n_candidates: How many of the best to return.
        seed: Of the sampler.
        storage: Where trials are kept; None keeps them in memory.
        study_name: Must differ whenever data differ.

    Raises:
        ValueError: If the replay loss is not a number.
    """

    shared = isinstance(storage, str)
    if isinstance(storage, str):
        storage = shared_storage(storage)
    kept = None if storage is None or shared else _as_written(storage, study_name, seed)

    def objective(trial: optuna.Trial) -> float:
        policy = family.suggest(trial, data)
        replay = replay_policy(data.traces, policy)
        loss = data.loss_of(replay)
        if not math.isfinite(loss):
            # Optuna would pass over the trial, and go on for ever to get one that counts.
            raise ValueError("the traces have steps without a recovered mass: the model's attention was not a number.")
        attributes = trial_attributes(trial.params, loss, replay.full_share)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if kept is not None:
            one = create_trial(
                params=trial.params, distributions=trial.distributions, value=loss, user_attrs=attributes
            )
            kept.add_trial(one)
        return loss

    study = _opened(storage if shared else None, study_name, seed)
    if kept is not None:
        _repeat(study, _complete(kept), seed)
    # Others are at work in a shared study: what is not as it was written stays there, and counts for nothing.
    n_known, n_edited = len(_complete(study)), len(_complete(study, as_written=False))
    if n_edited:
        print(_edited(n_edited, study_name), file=sys.stderr)
    with tqdm(desc=f"{family.name:>16}", total=n_trials, initial=n_known, unit="trial") as progress:
        if n_known < n_trials:
            study.optimize(
                objective,
                callbacks=[
                    MaxTrialsCallback(n_trials + n_edited, states=(TrialState.COMPLETE,)),
                    lambda _study, _trial: progress.update(),
                ],
            )
    trials = _complete(study)
    best: dict[str, optuna.trial.FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: float(trial.value or 0)):
        best.setdefault(_point(trial), trial)
    candidates = tuple(
        Candidate(dict(trial.params), family.suggest(FixedTrial(trial.params), data), float(trial.value or 0))
        for trial in list(best.values())[:n_candidates]
    )
    points = np.array([(trial.user_attrs["full_share"], trial.value) for trial in trials], dtype=np.float64)
    return Search(family.name, candidates, points)


def _repeat(study: optuna.Study, kept: list[optuna.trial.FrozenTrial], seed: int) -> None:
    """Draw the points of kept trials again, so that the sampler goes on where it was, and take their losses."""
    for number, one in enumerate(kept):
        trial = study.ask(one.distributions)
        if trial.params != one.params:
            # Of another version of the sampler: they count, and what follows must not repeat them.
            study.tell(trial, state=TrialState.FAIL)
            study.add_trials(kept[number:])
            study.sampler = optuna.samplers.TPESampler(seed=seed + len(kept))
            return
        for name, value in one.user_attrs.items():
            trial.set_user_attr(name, value)
        study.tell(trial, one.value)


def _as_written(storage: BaseStorage, study_name: str, seed: int) -> optuna.Study:
    """A study that one process keeps, without the first trial that was edited since, and what came after it."""
    study = _opened(storage, study_name, seed)
    known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    whole = list(itertools.takewhile(is_as_written, known))
    if len(whole) < len(known):
        print(_edited(len(known) - len(whole), study_name), file=sys.stderr)
        optuna.delete_study(study_name=study_name, storage=storage)
        study = _opened(storage, study_name, seed)
        study.add_trials(whole)
    return study


def _edited(n: int, study_name: str) -> str:
    return sentence(f"note: {n} trials of {study_name} are not, or follow one that is not, as written: computing anew.")


def _opened(storage: BaseStorage | None, study_name: str, seed: int) -> optuna.Study:
    study = optuna.create_study(study_name=study_name, storage=storage, load_if_exists=True)
    # What completes a study after an interruption must not repeat the points it began with.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(_complete(study)))
    return study


def _complete(study: optuna.Study, *, as_written: bool = True) -> list[optuna.trial.FrozenTrial]:
    """Complete trials that are, or are not, what the search wrote."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if is_as_written(trial) == as_written]


def _point(trial: optuna.Trial | optuna.trial.FrozenTrial) -> str:
    return repr(sorted(trial.params.items()))
