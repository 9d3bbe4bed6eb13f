"""The command that measures sensitivities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import Selection
from recycler import sensitivity
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.folder import record_prompts
from recycler.sensitivity import main
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
