from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from traces import Trace, TraceFolder, write_trace

MakeTrace = Callable[..., Trace]


def test_traces_come_sorted_by_name_as_a_sequence(make_trace: MakeTrace, tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write_trace(make_trace(name), tmp_path)
    folder = TraceFolder(tmp_path)
    assert [file.header.prompt["name"] for file in folder] == ["a", "b", "c"]
    assert len(folder) == 3
    assert folder[-1].path.name == "c.safetensors"
    assert [file.path.name for file in folder[:2]] == ["a.safetensors", "b.safetensors"]


def test_a_missing_folder_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone is no folder of traces: record some with python -m recycler\.record"):
        TraceFolder(tmp_path / "gone")


def test_a_file_is_no_folder(make_trace: MakeTrace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder of traces"):
        TraceFolder(write_trace(make_trace(), tmp_path).path)


def test_an_empty_folder_is_refused_with_the_command_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no traces: record some with python -m recycler\.record"):
        TraceFolder(tmp_path)


def test_traces_of_two_selections_are_refused_with_both(make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace("a", k=64), tmp_path)
    write_trace(make_trace("b", k=128), tmp_path)
    with pytest.raises(
        ValueError, match=r"mixes traces: b\.safetensors has selection k 128 instead of 64 as in a\.safetensors"
    ):
        TraceFolder(tmp_path)


def test_traces_of_two_models_are_refused(make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace("a", units=(2, 3)), tmp_path)
    write_trace(make_trace("b", units=(3, 2)), tmp_path)
    with pytest.raises(ValueError, match=r"mixes traces: b\.safetensors has model"):
        TraceFolder(tmp_path)


def test_traces_of_different_lengths_share_a_folder(make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace("a", n_steps=4), tmp_path)
    write_trace(make_trace("b", n_steps=9, max_age=7, n_prompt_tokens=2), tmp_path)
    assert [file.header.n_steps for file in TraceFolder(tmp_path)] == [4, 9]
