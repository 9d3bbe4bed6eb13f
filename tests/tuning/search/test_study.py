from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from policies import FixedStride, StepPolicy
from traces import Trace
from tuning import FAMILIES, Family, TraceBatch, TuningData, replay_policy, search_family
from tuning.search.study import Search

MakeTrace = Callable[..., Trace]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def data(make_trace: MakeTrace) -> TuningData:
    traces = TraceBatch([make_trace(name, n_steps=20, max_age=20, seed=seed) for seed, name in enumerate("ab")])
    return TuningData(traces, 0.3, np.linspace(0.5, 1.5, 6).reshape(2, 3))


class Counted(Family):
    """Any stride above 2; raises where it is told to, and counts."""

    name: ClassVar[str] = "counted"

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.n, self.fails_at, self.error = 0, fails_at, error

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        stride = trial.suggest_float("stride", 2.0, 9.0)
        self.n += not isinstance(trial, optuna.trial.FixedTrial)
        if self.n == self.fails_at:
            raise self.error("the power went")
        return FixedStride(stride)


class Coarse(Family):
    """Three different points only."""

    name: ClassVar[str] = "coarse"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        return FixedStride(trial.suggest_categorical("stride", [2, 3, 5]))


def search(family: Family, data: TuningData, n_trials: int = 5, **changed: Any) -> Search:
    options = {"n_candidates": 2, "seed": 0, "storage": None, "study_name": "one"} | changed
    return search_family(family, data, n_trials=n_trials, **options)


def file_storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path / "study.log")))


def test_a_search_has_the_trials_asked_for(data: TuningData) -> None:
    family = Counted()
    found = search(family, data, 7)
    assert (found.family, found.trials.shape, family.n) == ("counted", (7, 2), 7)


def test_candidates_are_the_best_trials_with_their_policies(data: TuningData) -> None:
    found = search(Counted(), data, 8, n_candidates=3)
    losses = [candidate.loss for candidate in found.candidates]
    np.testing.assert_allclose(losses, np.sort(found.trials[:, 1])[:3])
    for candidate in found.candidates:
        assert candidate.policy == FixedStride(candidate.parameters["stride"])
        assert data.loss(candidate.policy) == candidate.loss
        share = replay_policy(data.traces, candidate.policy).full_share
        assert [share, candidate.loss] in found.trials.tolist()


def test_candidates_differ_in_their_parameters(data: TuningData) -> None:
    found = search(Coarse(), data, 12, n_candidates=5)
    assert len(found.trials) == 12
    strides = [candidate.parameters["stride"] for candidate in found.candidates]
    assert len(strides) == len(set(strides)) <= 3
    assert strides[0] == 2


def test_the_same_seed_finds_the_same_and_another_seed_something_else(data: TuningData) -> None:
    first, again, other = (search(Counted(), data, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.trials, again.trials)
    assert first.candidates == again.candidates
    assert (first.trials != other.trials).any()


@pytest.mark.parametrize("make", [lambda path: InMemoryStorage(), file_storage, lambda path: f"sqlite:///{path}/a.db"])
def test_a_study_goes_on_to_the_number_of_trials_in_total(
    data: TuningData, tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    storage = make(tmp_path)
    short = search(Counted(), data, 3, storage=storage)
    family = Counted()
    found = search(family, data, 8, storage=storage)
    assert (len(found.trials), family.n) == (8, 5)
    np.testing.assert_array_equal(found.trials[:3], short.trials)
    # What follows is new, not the first points over again.
    assert len({tuple(trial.params.items()) for trial in _trials(storage)}) == 8


def _trials(storage: Any) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="one", storage=storage).get_trials()


def test_a_study_that_has_enough_trials_tries_nothing(data: TuningData, tmp_path: Path) -> None:
    first = search(Counted(), data, 4, storage=file_storage(tmp_path))
    family = Counted()
    again = search(family, data, 4, storage=file_storage(tmp_path))
    assert family.n == 0
    np.testing.assert_array_equal(again.trials, first.trials)
    assert again.candidates == first.candidates


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_study_is_completed(
    data: TuningData, tmp_path: Path, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match="the power went"):
        search(Counted(fails_at=4, error=error), data, 6, storage=file_storage(tmp_path))
    family = Counted()
    found = search(family, data, 6, storage=file_storage(tmp_path))
    assert (len(found.trials), family.n) == (6, 3)
    np.testing.assert_array_equal(found.trials, search(Counted(), data, 6).trials)


def test_a_study_of_points_that_are_not_drawn_again_is_gone_on_from(data: TuningData, tmp_path: Path) -> None:
    search(Counted(), data, 3, seed=1, storage=file_storage(tmp_path))
    family = Counted()
    found = search(family, data, 5, seed=2, storage=file_storage(tmp_path))
    assert (len(found.trials), family.n) == (5, 2)


def test_studies_of_different_names_do_not_meet(data: TuningData, tmp_path: Path) -> None:
    storage = file_storage(tmp_path)
    search(Counted(), data, 3, storage=storage)
    found = search(Counted(), data, 2, storage=storage, study_name="two")
    assert len(found.trials) == 2


def test_in_memory_nothing_is_kept(data: TuningData) -> None:
    search(Counted(), data, 3)
    assert len(search(Counted(), data, 2).trials) == 2


def test_a_loss_that_is_not_a_number_ends_the_search(make_trace: MakeTrace) -> None:
    traces = TraceBatch([make_trace(n_steps=20, max_age=20, recovered_mass=np.float32("nan"))])
    with pytest.raises(ValueError, match="steps without a recovered mass"):
        search(Counted(), TuningData(traces, 0.3, np.ones((2, 3))))


def test_progress_goes_to_standard_error(data: TuningData, capfd: pytest.CaptureFixture[str]) -> None:
    search(Counted(), data, 3)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "counted" in captured.err
    assert "3/3" in captured.err


@pytest.mark.parametrize("name", ["fixed_stride", "stride_profile"])
def test_candidates_of_a_family_are_rebuilt_from_a_file_exactly(data: TuningData, tmp_path: Path, name: str) -> None:
    first = search(FAMILIES[name], data, 4, storage=file_storage(tmp_path), n_candidates=4)
    again = search(FAMILIES[name], data, 4, storage=file_storage(tmp_path), n_candidates=4)
    assert again.candidates == first.candidates
    for candidate in again.candidates:
        assert data.loss(candidate.policy) == candidate.loss


def test_an_edited_trial_and_those_after_it_are_computed_anew(
    data: TuningData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = search(Counted(), data, 6)
    search(Counted(), data, 6, storage=file_storage(tmp_path))
    path = tmp_path / "study.log"
    losses = whole.trials[:, 1].tolist()
    edited = next(number for number in range(1, 6) if losses.count(losses[number]) == 1)
    text = path.read_text()
    assert repr(losses[edited]) in text
    path.write_text(text.replace(repr(losses[edited]), "1e-09"))
    for n_anew in (6 - edited, 0):
        family = Counted()
        again = search(family, data, 6, storage=file_storage(tmp_path))
        assert family.n == n_anew
        np.testing.assert_array_equal(again.trials, whole.trials)
        assert (f"{n_anew} trials of one are not" in capsys.readouterr().err) == (n_anew > 0)


def test_an_edited_trial_of_a_shared_study_counts_for_nothing(
    data: TuningData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    search(Counted(), data, 4, storage=url)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("UPDATE trial_values SET value = 1e-9 WHERE trial_id = 2")
    found = search(Counted(), data, 4, storage=url)
    assert len(found.trials) == 4
    assert 1e-9 not in found.trials[:, 1]
    assert len(_trials(url)) == 5
    assert "1 trials of one are not" in capsys.readouterr().err
