"""Closed loops on disk: an equal run is read back, any other is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import AlwaysFull, CosineThreshold, FixedStride, NeverFull, Selection, StepPolicy
from recycler.measure import closed_loop
from recycler.measure.closed_loop import ClosedLoop, ClosedLoopStore, run_closed_loop, run_closed_loops
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.one_prompt import record_trace, traced_prompt
from traces import TraceFile, write_trace

N_PROMPT, N_STEPS = 40, 6
SELECTION = Selection(k=12, sinks=2, window=4)
POLICIES = [FixedStride(3), CosineThreshold([[0.1, 0.2], [0.3, 0.4]]), NeverFull()]


@pytest.fixture
def load(make_model: Callable[..., PreTrainedModel]) -> Callable[..., LoadedModel]:
    def load(name: str = "tiny", dtype: torch.dtype = torch.float32) -> LoadedModel:
        return LoadedModel(make_model(dtype=dtype), tokenizer=None, id=name)  # type: ignore[arg-type]

    return load


@pytest.fixture
def loaded(load: Callable[..., LoadedModel]) -> LoadedModel:
    return load()


@pytest.fixture
def trace(loaded: LoadedModel, tmp_path: Path) -> Callable[..., TraceFile]:
    def trace(
        name: str = "one", seed: int = 0, n_prompt: int = N_PROMPT, selection: Selection = SELECTION
    ) -> TraceFile:
        tokens = np.random.default_rng(seed).integers(0, 50, N_PROMPT + N_STEPS)
        prompt = Prompt(name, "random", tokens, n_prompt, "drawn", "CC0-1.0")
        recorded = record_trace(loaded.model, prompt, selection, max_age=2, model_id="tiny")
        return write_trace(recorded, tmp_path / "traces" / f"{n_prompt}-{seed}-{selection.k}")

    return trace


class Runs:
    """Counts runs, and can be told to break off."""

    def __init__(self) -> None:
        self.n = 0
        self.break_off = False

    def __call__(self, *arguments: Any, **options: Any) -> list[ClosedLoop]:
        self.n += 1
        if self.break_off:
            raise KeyboardInterrupt
        return run_closed_loops(*arguments, **options)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    runs = Runs()
    monkeypatch.setattr(closed_loop, "run_closed_loops", runs)
    return runs


@pytest.fixture
def store(tmp_path: Path) -> ClosedLoopStore:
    return ClosedLoopStore(tmp_path / "deep" / "store")


def equal(one: ClosedLoop, other: ClosedLoop) -> None:
    for field in dataclasses.fields(ClosedLoop):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_a_run_is_the_closed_loop_of_the_trace(
    store: ClosedLoopStore, loaded: LoadedModel, trace: Callable[..., TraceFile]
) -> None:
    file = trace()
    found = store.run(loaded, file, POLICIES)
    equal(found, run_closed_loop(loaded.model, file.array("tokens"), N_PROMPT, POLICIES, SELECTION))
    assert found.kl.shape == (3, N_STEPS)


def test_an_equal_run_is_read_not_run(
    store: ClosedLoopStore, loaded: LoadedModel, trace: Callable[..., TraceFile], runs: Runs
) -> None:
    first = store.run(loaded, trace(), POLICIES)
    (path,) = store.folder.iterdir()
    assert path.suffix == ".npz"
    before = path.read_bytes()
    again = ClosedLoopStore(store.folder).run(loaded, trace(), list(POLICIES))
    equal(first, again)
    assert (runs.n, path.read_bytes()) == (1, before)
    np.testing.assert_array_equal(again.full_share, first.full_share)


@pytest.mark.parametrize(
    "policies",
    [
        POLICIES[:2],
        POLICIES[::-1],
        [FixedStride(3, phase=1), *POLICIES[1:]],
        [FixedStride(3), CosineThreshold([[0.1, 0.2], [0.3, 0.4 + 1e-12]]), NeverFull()],
        [*POLICIES, AlwaysFull()],
    ],
)
def test_other_policies_are_another_run(
    store: ClosedLoopStore,
    loaded: LoadedModel,
    trace: Callable[..., TraceFile],
    runs: Runs,
    policies: list[StepPolicy],
) -> None:
    store.run(loaded, trace(), POLICIES)
    found = store.run(loaded, trace(), policies)
    assert (runs.n, len(list(store.folder.iterdir()))) == (2, 2)
    equal(found, run_closed_loop(loaded.model, trace().array("tokens"), N_PROMPT, policies, SELECTION))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"n_prompt": N_PROMPT - 1}, {"selection": Selection(13, 2, 4)}])
def test_another_prompt_or_selection_is_another_run(
    store: ClosedLoopStore, loaded: LoadedModel, trace: Callable[..., TraceFile], runs: Runs, changed: dict[str, Any]
) -> None:
    store.run(loaded, trace(), POLICIES)
    store.run(loaded, trace(**changed), POLICIES)
    assert (runs.n, len(list(store.folder.iterdir()))) == (2, 2)


def test_the_same_text_under_another_name_is_an_equal_run(
    store: ClosedLoopStore, loaded: LoadedModel, trace: Callable[..., TraceFile], runs: Runs
) -> None:
    equal(store.run(loaded, trace(), POLICIES), store.run(loaded, trace(name="two"), POLICIES))
    assert runs.n == 1


def test_several_prompts_run_together_as_each_runs_alone(
    store: ClosedLoopStore,
    loaded: LoadedModel,
    trace: Callable[..., TraceFile],
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three prompts of one length and one of another, twelve rows at once: of three policies and full attention, three.
    monkeypatch.setattr(closed_loop, "_ROWS_AT_ONCE", 12)
    files = [trace(seed=seed) for seed in range(4)] + [trace(seed=4, n_prompt=N_PROMPT - 1), trace(seed=5)]
    prompts = [traced_prompt(file) for file in files]
    found = store.run_all(loaded, prompts, POLICIES, SELECTION)
    # Three; one, because the next is longer; that one; the last.
    assert runs.n == len(list(store.folder.iterdir())) == 4
    for prompt, loop in zip(prompts, found, strict=True):
        alone = run_closed_loop(loaded.model, prompt.tokens, prompt.n_prompt_tokens, POLICIES, SELECTION)
        np.testing.assert_array_equal(loop.full, alone.full)
        np.testing.assert_array_equal(loop.read_share, alone.read_share)
        np.testing.assert_allclose(loop.kl, alone.kl, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(loop.accuracy, alone.accuracy)
    n_before = runs.n
    for loop, again in zip(found, store.run_all(loaded, prompts, POLICIES, SELECTION), strict=True):
        equal(loop, again)
    assert runs.n == n_before
