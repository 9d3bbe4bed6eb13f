from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import Selection, StepPolicy, StepSignals
from recycler.measure import ablation
from recycler.measure.ablation import measure_prompt_sensitivity, measure_sensitivity, unit_sensitivity
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.folder import record_prompts
from traces import TraceFile
from traces.sensitivity import FILE_NAME, Sensitivity

N_PROMPT, N_STEPS = 40, 8
SELECTION = Selection(k=12, sinks=2, window=4)


@pytest.fixture
def loaded(make_model: Callable[..., PreTrainedModel]) -> LoadedModel:
    return LoadedModel(make_model(layers=3, kv_heads=2), tokenizer=None, id="tiny")  # type: ignore[arg-type]


@pytest.fixture
def files(loaded: LoadedModel, tmp_path: Path) -> list[TraceFile]:
    prompts = [
        Prompt(
            name, "random", np.random.default_rng(seed).integers(0, 50, N_PROMPT + N_STEPS), N_PROMPT, "drawn", "CC0"
        )
        for seed, name in enumerate("abc")
    ]
    return record_prompts(loaded, prompts, SELECTION, tmp_path, max_age=3)


@dataclass(frozen=True)
class AllBut(StepPolicy):
    """One unit never runs full, all others always do."""

    unit: tuple[int, int]
    kind: ClassVar[str] = "all_but"

    def decide(self, signals: StepSignals) -> Any:
        full = signals.age >= 0
        if signals.layer == self.unit[0]:
            full[:, self.unit[1]] = False
        return full


def test_each_unit_is_ablated_alone(loaded: LoadedModel, files: list[TraceFile]) -> None:
    tokens = files[0].array("tokens")
    table = unit_sensitivity(loaded, tokens, N_PROMPT, SELECTION)
    assert (table.shape, table.dtype) == ((3, 2), np.float64)
    for unit in np.ndindex(3, 2):
        alone = run_closed_loop(loaded.model, tokens, N_PROMPT, [AllBut(unit)], SELECTION)  # type: ignore[arg-type]
        assert table[unit] == pytest.approx(alone.kl.mean(), rel=1e-9)
        assert not alone.full[0][:, unit[0], unit[1]].any()
        assert alone.full.sum() == N_STEPS * 5
    assert (table > 0).all()
    assert len(np.unique(table)) == 6


@pytest.mark.parametrize("at_once", [1, 4, 6, 7])
def test_how_many_units_share_a_batch_does_not_matter(
    loaded: LoadedModel, files: list[TraceFile], at_once: int
) -> None:
    tokens = files[0].array("tokens")
    table = unit_sensitivity(loaded, tokens, N_PROMPT, SELECTION, units_at_once=at_once)
    np.testing.assert_allclose(table, unit_sensitivity(loaded, tokens, N_PROMPT, SELECTION), rtol=1e-9)


def test_sets_that_hold_everything_do_no_damage(loaded: LoadedModel, files: list[TraceFile]) -> None:
    table = unit_sensitivity(loaded, files[0].array("tokens"), N_PROMPT, Selection(k=N_PROMPT + N_STEPS))
    np.testing.assert_allclose(table, 0, atol=1e-12)


def test_prompts_are_measured_one_by_one_and_kept(loaded: LoadedModel, files: list[TraceFile], tmp_path: Path) -> None:
    found = measure_sensitivity(loaded, tmp_path, files[:2], n_steps=5)
    assert (found.n_steps, list(found.kl)) == (5, ["a", "b"])
    assert (found.model, found.selection) == (files[0].header.model, files[0].header.selection)
    for file in files[:2]:
        tokens = file.array("tokens")[: N_PROMPT + 5]
        np.testing.assert_array_equal(found.kl[file.path.stem], unit_sensitivity(loaded, tokens, N_PROMPT, SELECTION))
    read = Sensitivity.read(tmp_path)
    assert read is not None
    for name, table in found.kl.items():
        np.testing.assert_array_equal(read.kl[name], table)


def test_no_more_steps_are_measured_than_there_are(loaded: LoadedModel, files: list[TraceFile], tmp_path: Path) -> None:
    assert measure_sensitivity(loaded, tmp_path, files[:1]).n_steps == N_STEPS


class Counting:
    """Counts measurements, and interrupts one of them."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.n, self.interrupt_at = 0, interrupt_at

    def __call__(self, *arguments: Any) -> np.ndarray:
        self.n += 1
        if self.n == self.interrupt_at:
            raise KeyboardInterrupt
        return np.full((3, 2), float(self.n))


def test_what_was_measured_is_not_measured_again(
    loaded: LoadedModel, files: list[TraceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "unit_sensitivity", count := Counting())
    measure_sensitivity(loaded, tmp_path, files[1:2])
    found = measure_sensitivity(loaded, tmp_path, files)
    assert count.n == 3
    assert {name: table[0, 0] for name, table in found.kl.items()} == {"b": 1, "a": 2, "c": 3}
    before = (tmp_path / FILE_NAME).read_bytes()
    measure_sensitivity(loaded, tmp_path, files[:1])
    assert (count.n, (tmp_path / FILE_NAME).read_bytes()) == (3, before)


def test_an_interrupt_keeps_the_prompts_that_are_done(
    loaded: LoadedModel, files: list[TraceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "unit_sensitivity", Counting(interrupt_at=3))
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(loaded, tmp_path, files)
    read = Sensitivity.read(tmp_path)
    assert read is not None
    assert list(read.kl) == ["a", "b"]
    monkeypatch.setattr(ablation, "unit_sensitivity", count := Counting())
    assert list(measure_sensitivity(loaded, tmp_path, files).kl) == ["a", "b", "c"]
    assert count.n == 1


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"model": {}}, 'id "other" instead of "tiny"'),
        ({"selection": {"k": 13}}, 'group null instead of "max", k 13 instead of 12'),
        ({"n_steps": 7}, "steps 7 instead of 8"),
    ],
)
def test_measurements_of_other_settings_are_made_anew_and_named(
    loaded: LoadedModel, files: list[TraceFile], tmp_path: Path, changed: dict[str, Any], difference: str
) -> None:
    header = files[0].header
    other: dict[str, Any] = {"model": header.model, "selection": header.selection, "n_steps": N_STEPS, "kl": {}}
    other |= changed
    if not other["model"]:
        other["model"] = dict(header.model) | {"id": "other"}
    Sensitivity(**other).write(tmp_path)
    with pytest.warns(UserWarning, match=f"sensitivity.json was measured with {difference}"):
        assert list(measure_sensitivity(loaded, tmp_path, files[:1]).kl) == ["a"]


def test_a_table_of_another_text_or_of_other_weights_is_measured_anew(
    make_model: Callable[..., PreTrainedModel],
    loaded: LoadedModel,
    files: list[TraceFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (Prompt("same", "random", np.arange(48) + i, N_PROMPT, "made", "CC0") for i in range(2))
    retrained = copy.deepcopy(loaded.model)
    with torch.no_grad():
        retrained.lm_head.weight[3, 5] += 1
    others = LoadedModel(retrained, tokenizer=None, id=loaded.id)  # type: ignore[arg-type]
    monkeypatch.setattr(ablation, "unit_sensitivity", count := Counting())
    measure_prompt_sensitivity(loaded, tmp_path, [first], SELECTION)
    for n, (model, prompt) in enumerate([(loaded, second), (others, second)], start=2):
        with pytest.warns(UserWarning, match="has same of another text, other weights or versions"):
            found = measure_prompt_sensitivity(model, tmp_path, [prompt], SELECTION)
        assert count.n == n
        assert found.kl["same"][0, 0] == n
