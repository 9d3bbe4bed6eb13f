"""Outcomes on disk: an equal run is read back, any other is run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies import NeverFull, Selection
from recycler.evaluate import EveryStep, FreshTopK, Method, Outcome, PromptOutcome, Quest, Scheduled, store
from recycler.evaluate.answers import measure
from recycler.evaluate.store import FidelityStore
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
    monkeypatch.setattr(store, "measure", runs)
    return runs


@pytest.fixture
def kept(tmp_path: Path) -> FidelityStore:
    return FidelityStore(tmp_path / "deep" / "store")


SELECTION = Selection(12, 2, 4)
NEVER = Scheduled("never", "", NeverFull(), SELECTION)


def files(kept: FidelityStore) -> list[str]:
    return sorted(path.name for path in kept.folder.iterdir()) if kept.folder.exists() else []


def equal(one: PromptOutcome, other: PromptOutcome) -> None:
    assert (one.name, one.task, one.n_prompt_tokens) == (other.name, other.task, other.n_prompt_tokens)
    assert set(one.methods) == set(other.methods)
    for name, found in one.methods.items():
        for field in dataclasses.fields(Outcome):
            mine, theirs = getattr(found, field.name), getattr(other.methods[name], field.name)
            np.testing.assert_equal(mine, theirs, err_msg=f"{name} {field.name}")


def test_an_equal_run_is_read_back(
    kept: FidelityStore, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    first = kept.measure(loaded, make_task(), methods)
    again = FidelityStore(kept.folder).measure(loaded, make_task(), methods)
    assert runs.n == 1
    equal(first, again)
    assert len(files(kept)) == 1
    assert files(kept)[0].startswith("numbers-000-")


def test_the_order_of_methods_does_not_matter(
    kept: FidelityStore, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    equal(kept.measure(loaded, make_task(), methods), kept.measure(loaded, make_task(), methods[::-1]))
    assert runs.n == 1


@pytest.mark.parametrize(
    "methods",
    [
        [],
        [NEVER, Scheduled("more", "", NeverFull(), SELECTION)],
        [dataclasses.replace(NEVER, name="other")],
        [dataclasses.replace(NEVER, selection=Selection(12, 2, 5))],
        [dataclasses.replace(NEVER, selection=dataclasses.replace(SELECTION, prompt_queries=None))],
        [EveryStep("never", "", FreshTopK(SELECTION))],
        [EveryStep("never", "", Quest(16))],
    ],
    ids=["none", "more", "name", "selection", "prompt queries", "fresh", "quest"],
)
def test_a_run_of_other_methods_is_another_run(
    kept: FidelityStore, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    kept.measure(loaded, make_task(), [NEVER])
    found = kept.measure(loaded, make_task(), methods)
    assert runs.n == len(files(kept)) == 2
    assert list(found.methods) == ["full", *(method.name for method in methods)]


def test_settings_of_a_selector_make_another_run(
    kept: FidelityStore, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    for selector in (Quest(16), Quest(32), Quest(16, page_tokens=8), Quest(16, dense_layers=0)):
        kept.measure(loaded, make_task(), [EveryStep("quest", "", selector)])
    assert runs.n == 4


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"n_prompt": 39, "n_reference": 11}, {"n_new": 3}, {"name": "numbers-001"}], ids=str
)
def test_another_prompt_is_another_run(
    kept: FidelityStore,
    runs: Runs,
    loaded: LoadedModel,
    make_task: Callable[..., TaskPrompt],
    other: dict[str, Any],
) -> None:
    kept.measure(loaded, make_task(), [NEVER])
    kept.measure(loaded, make_task(**other), [NEVER])
    assert runs.n == len(files(kept)) == 2


def test_another_model_another_precision_and_other_packages_are_other_runs(
    kept: FidelityStore,
    runs: Runs,
    load: Callable[..., LoadedModel],
    make_task: Callable[..., TaskPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept.measure(load(), make_task(), [NEVER])
    kept.measure(load("other"), make_task(), [NEVER])
    kept.measure(load(dtype=torch.float32), make_task(), [NEVER])
    monkeypatch.setattr(store, "versions", lambda: {"torch": "9.9"})
    kept.measure(load(), make_task(), [NEVER])
    assert runs.n == len(files(kept)) == 4


def test_a_run_that_broke_off_leaves_no_file(
    kept: FidelityStore, runs: Runs, loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    runs.break_off = True
    with pytest.raises(KeyboardInterrupt):
        kept.measure(loaded, make_task(), [NEVER])
    assert files(kept) == []


def test_a_write_that_broke_off_leaves_nothing_that_is_read(
    kept: FidelityStore,
    runs: Runs,
    loaded: LoadedModel,
    make_task: Callable[..., TaskPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Path.write_text

    def half(path: Path, text: str, **how: Any) -> int:
        write(path, text[: len(text) // 2], **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            kept.measure(loaded, make_task(), [NEVER])
    assert [name for name in files(kept) if name.endswith(".json")] == []
    found = kept.measure(loaded, make_task(), [NEVER])
    assert runs.n == 2
    assert len(files(kept)) == 1
    equal(found, kept.measure(loaded, make_task(), [NEVER]))
    assert runs.n == 2


def test_a_file_appears_whole_or_not_at_all(
    kept: FidelityStore,
    runs: Runs,
    loaded: LoadedModel,
    make_task: Callable[..., TaskPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        kept.measure(loaded, make_task(), [NEVER])
    assert [name for name in files(kept) if name.endswith(".json")] == []
