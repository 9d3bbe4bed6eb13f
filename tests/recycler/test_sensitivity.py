from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import Selection, StepPolicy, StepSignals
from recycler import sensitivity
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.folder import record_prompts
from recycler.sensitivity import main, measure_sensitivity, unit_sensitivity
from traces import TraceFile
from traces.reporting.command import run_command
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
    monkeypatch.setattr(sensitivity, "unit_sensitivity", count := Counting())
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
    monkeypatch.setattr(sensitivity, "unit_sensitivity", Counting(interrupt_at=3))
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(loaded, tmp_path, files)
    read = Sensitivity.read(tmp_path)
    assert read is not None
    assert list(read.kl) == ["a", "b"]
    monkeypatch.setattr(sensitivity, "unit_sensitivity", count := Counting())
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
def test_measurements_of_other_settings_are_refused_with_the_difference(
    loaded: LoadedModel, files: list[TraceFile], tmp_path: Path, changed: dict[str, Any], difference: str
) -> None:
    header = files[0].header
    same: dict[str, Any] = {"model": header.model, "selection": header.selection, "n_steps": N_STEPS, "kl": {}}
    other = same | changed
    if not other["model"]:
        other["model"] = dict(header.model) | {"id": "other"}
    Sensitivity(**other).write(tmp_path)
    with pytest.raises(ValueError, match=f"sensitivity.json was measured with {difference}"):
        measure_sensitivity(loaded, tmp_path, files)
    Sensitivity(**same).write(tmp_path)
    assert len(measure_sensitivity(loaded, tmp_path, files[:1]).kl) == 1


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_command(main, list(arguments))
    return int(exit_.value.code or 0)


def test_the_command_measures_a_folder_and_names_the_most_sensitive_unit(
    loaded: LoadedModel,
    files: list[TraceFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sensitivity, "load_model", lambda *args, **kwargs: asked.append((args, kwargs)) or loaded)
    assert command(str(tmp_path), "--steps", "4", "--model", "mine", "--dtype", "float64") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out.splitlines()[-1])
    assert values.pop("seconds") >= 0
    read = Sensitivity.read(tmp_path)
    assert read is not None
    mean = np.mean(list(read.kl.values()), axis=0)
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    most = {"layer": layer, "kv_head": head, "kl": pytest.approx(mean.max())}
    assert values == {"folder": str(tmp_path), "prompts": 3, "steps": 4, "most_sensitive": most}
    assert asked == [(("mine",), {"dtype": "float64", "device": None})]


def test_the_command_refuses_a_model_of_another_shape(
    make_model: Callable[..., PreTrainedModel],
    files: list[TraceFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = LoadedModel(make_model(layers=2, kv_heads=2, dtype=torch.float32), None, "other")  # type: ignore[arg-type]
    monkeypatch.setattr(sensitivity, "load_model", lambda *args, **kwargs: other)
    assert command(str(tmp_path)) == 2
    assert capsys.readouterr().err == "error: the traces are of (3, 2) units, but other has (2, 2).\n"
    assert not (tmp_path / FILE_NAME).exists()


def test_the_command_refuses_a_folder_without_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(tmp_path)) == 2
    assert "holds no traces" in capsys.readouterr().err
