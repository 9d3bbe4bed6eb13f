"""Losses by size are what traces with each of the sizes say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from policies import Selection
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record import size_losses
from recycler.record.one_prompt import record_trace
from recycler.record.size_losses import measure_size_losses, set_sizes
from traces.size_losses import SetLosses

N_PROMPT, N_STEPS = 60, 9
SELECTION = Selection(k=16, sinks=2, window=4, pool_forward=0, prompt_queries=5)


@pytest.fixture
def loaded(make_model: Callable[..., PreTrainedModel]) -> LoadedModel:
    return LoadedModel(make_model(layers=3, kv_heads=2), tokenizer=None, id="tiny")  # type: ignore[arg-type]


@pytest.fixture
def prompts() -> list[Prompt]:
    def tokens(seed: int) -> Any:
        return np.random.default_rng(seed).integers(0, 50, N_PROMPT + N_STEPS)

    return [Prompt(name, "random", tokens(seed), N_PROMPT, "drawn", "CC0") for seed, name in enumerate("ab")]


@pytest.mark.parametrize(
    ("k", "window", "sizes"), [(128, 32, (48, 96, 128, 192, 320)), (40, 32, (36, 40, 60, 100)), (36, 32, (36, 54, 90))]
)
def test_sizes_hold_k_and_have_room_for_sinks_and_window(k: int, window: int, sizes: tuple[int, ...]) -> None:
    assert set_sizes(Selection(k, sinks=4, window=window)) == sizes


@pytest.mark.parametrize("apart", [1, 3, 8])
def test_each_size_loses_what_a_trace_with_this_k_loses_over_the_sets_of_every_so_many_steps(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    monkeypatch.setattr(size_losses, "_SOURCES_APART", apart)
    found = measure_size_losses(loaded, prompts, SELECTION, tmp_path)
    assert found.sizes == (6, 12, 16, 24, 40)
    # Steps are counted from the prompt's end, whose set is the first.
    step, age = np.indices((N_STEPS, N_STEPS)) + 1
    is_looked_at = (step - age) % apart == 0
    for prompt in prompts:
        for size, by_age, since_prompt in zip(found.sizes, *found.lost[prompt.name], strict=True):
            selection = dataclasses.replace(SELECTION, k=size)
            mass = record_trace(loaded.model, prompt, selection, max_age=N_STEPS, model_id=loaded.id).recovered_mass
            some = np.where(is_looked_at[..., None, None], mass, np.nan)
            np.testing.assert_allclose(by_age, 1 - np.nanmean(some, axis=0), rtol=0, atol=3e-7)
            np.testing.assert_allclose(since_prompt, 1 - np.diagonal(mass).transpose(2, 0, 1), rtol=0, atol=3e-7)


def test_what_was_measured_is_not_measured_again(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    inner = size_losses._lost_by_size

    def counting(loaded: LoadedModel, prompt: Prompt, *more: Any) -> SetLosses:
        measured.append(prompt.name)
        return inner(loaded, prompt, *more)

    monkeypatch.setattr(size_losses, "_lost_by_size", counting)
    measure_size_losses(loaded, prompts[:1], SELECTION, tmp_path)
    found = measure_size_losses(loaded, prompts, SELECTION, tmp_path)
    again = measure_size_losses(loaded, prompts, SELECTION, tmp_path)
    assert measured == ["a", "b"]
    assert list(found.lost) == list(again.lost) == ["a", "b"]
    np.testing.assert_array_equal(found.lost["a"].by_age, again.lost["a"].by_age)


def test_losses_of_another_selection_are_refused(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    measure_size_losses(loaded, prompts[:1], SELECTION, tmp_path)
    with pytest.raises(ValueError, match=r"size_losses.npz was measured with window 4 instead of 5: remove it"):
        measure_size_losses(loaded, prompts, dataclasses.replace(SELECTION, window=5), tmp_path)
