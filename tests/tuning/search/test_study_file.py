"""A study's file after a full disk or a killed process."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest

from tuning.search.study_file import study_storage


def search(path: Path, n_trials: int) -> optuna.Study:
    study = optuna.create_study(storage=study_storage(path), study_name="one", load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)
    return study


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "study.log"
    search(path, 3)
    return path


def test_a_whole_file_is_opened_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    study_storage(path)
    assert path.read_bytes() == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("n_bytes", [1, 2, 15, 40])
def test_a_torn_last_line_is_cut_off_and_the_search_goes_on(
    path: Path, n_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:n_bytes])
    assert len(search(path, 2).trials) == 5
    assert path.read_bytes().startswith(whole)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"note: the last line of {path} was not written whole, and was cut off."
    )
    assert not path.with_name(path.name + ".lock").exists()


def test_a_line_without_its_end_is_torn_too(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    study_storage(path)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("line", [b"half a line\n", b"{}\n", b"[" * 5000 + b"\n", b'{"op_code": 4, "worker_id": 3}\n'])
def test_a_file_damaged_in_the_middle_is_set_aside_and_said(
    path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = line
    path.write_bytes(b"".join(lines))
    assert len(search(path, 2).trials) == 2
    assert path.with_name("study.log.damaged").read_bytes() == b"".join(lines)
    note = capsys.readouterr().err
    assert note.startswith(f"note: {path} is damaged (")
    assert note.endswith("): it was set aside as study.log.damaged, and the search begins anew.\n")
    assert len(note) <= 301


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "study.log")
    with pytest.raises(ValueError, match="is no ordinary file"):
        study_storage(tmp_path / "study.log")
