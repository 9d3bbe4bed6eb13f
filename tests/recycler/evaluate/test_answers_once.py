"""Outcomes kept in a store: an equal measurement is read back and scored anew, any other is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import NeverFull, Selection
from recycler.evaluate import Method, Outcome, PromptOutcome, Quest, Scheduled, answers
from recycler.evaluate.answers import measure, measure_once
from recycler.evaluate.baselines import fresh_top_k
from recycler.measure.store import Store
from recycler.model.loading import LoadedModel
from recycler.tasks import TaskPrompt


class Runs:
    """Counts runs, and can be told to break off."""

    def __init__(self) -> None:
        self.n = 0
        self.break_off = False

    def __call__(self, *arguments: Any, **options: Any) -> PromptOutcome:
        self.n += 1
        if self.break_off:
            raise KeyboardInterrupt
        return measure(*arguments, fast=False, **options)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    runs = Runs()
    monkeypatch.setattr(answers, "measure", runs)
    return runs


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "store")


SELECTION = Selection(12, 2, 4)
NEVER = Scheduled("never", "", NeverFull(), SELECTION)


def files(kept: Store) -> list[str]:
    return sorted(path.name for path in kept.folder.iterdir()) if kept.folder.exists() else []


def equal(one: PromptOutcome, other: PromptOutcome) -> None:
    assert (one.name, one.task, one.n_prompt_tokens) == (other.name, other.task, other.n_prompt_tokens)
    assert set(one.methods) == set(other.methods)
    for name, found in one.methods.items():
        for field in dataclasses.fields(Outcome):
            mine, theirs = getattr(found, field.name), getattr(other.methods[name], field.name)
            np.testing.assert_equal(mine, theirs, err_msg=f"{name} {field.name}")


def test_an_equal_run_is_read_back(
    kept: Store, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    first = measure_once(kept, loaded, make_task(), methods)
    again = measure_once(Store(kept.folder), loaded, make_task(), methods)
    assert runs.n == 1
    equal(first, again)
    assert len(files(kept)) == 1


def test_the_order_of_methods_does_not_matter(
    kept: Store, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    equal(measure_once(kept, loaded, make_task(), methods), measure_once(kept, loaded, make_task(), methods[::-1]))
    assert runs.n == 1


@pytest.mark.parametrize(
    "methods",
    [
        [],
        [NEVER, Scheduled("more", "", NeverFull(), SELECTION)],
        [dataclasses.replace(NEVER, name="other")],
        [dataclasses.replace(NEVER, selection=Selection(12, 2, 5))],
        [dataclasses.replace(NEVER, selection=dataclasses.replace(SELECTION, prompt_queries=None))],
        [fresh_top_k("never", "", SELECTION)],
        [Quest("never", "", 16)],
    ],
    ids=["none", "more", "name", "selection", "prompt queries", "fresh", "quest"],
)
def test_a_run_of_other_methods_is_another_run(
    kept: Store, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    measure_once(kept, loaded, make_task(), [NEVER])
    found = measure_once(kept, loaded, make_task(), methods)
    assert runs.n == len(files(kept)) == 2
    assert list(found.methods) == ["full", *(method.name for method in methods)]


def test_settings_of_quest_make_another_run(
    kept: Store, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    for settings in ((16,), (32,), (16, 8), (16, 16, 0)):
        measure_once(kept, loaded, make_task(), [Quest("quest", "", *settings)])
    assert runs.n == 4


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"n_prompt": 39, "n_reference": 11}, {"n_new": 3}, {"name": "numbers-001"}], ids=str
)
def test_another_prompt_is_another_run(
    kept: Store,
    runs: Runs,
    loaded: LoadedModel,
    make_task: Callable[..., TaskPrompt],
    other: dict[str, Any],
) -> None:
    measure_once(kept, loaded, make_task(), [NEVER])
    measure_once(kept, loaded, make_task(**other), [NEVER])
    assert runs.n == len(files(kept)) == 2


def test_answers_that_were_kept_are_scored_by_the_score_of_today(
    kept: Store, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    first = measure_once(kept, loaded, make_task(), [NEVER])
    again = measure_once(kept, loaded, make_task(score=lambda text: 0.25), [NEVER])
    assert runs.n == 1
    assert {one.score for one in again.methods.values()} == {0.25}
    assert [one.answer for one in again.methods.values()] == [one.answer for one in first.methods.values()]
