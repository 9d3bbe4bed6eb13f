"""A trace that is filled in where it lies is the file that is written of it whole."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import Trace, TraceFile, TraceHeader, write_trace
from traces.trace_on_disk import trace_on_disk


def filled(header: TraceHeader, folder: Path, trace: Trace) -> Path:
    with trace_on_disk(header, folder) as lying:
        for name, array in trace.arrays().items():
            getattr(lying, name)[...] = array
    return folder / f"{trace.name}.safetensors"


@pytest.mark.parametrize("n_steps", [0, 1, 9])
@pytest.mark.parametrize("name", ["one", "a-longer-name.of_a_prompt"])
def test_it_is_byte_for_byte_what_write_trace_makes(make_trace: Any, tmp_path: Path, n_steps: int, name: str) -> None:
    trace = make_trace(name, n_steps=n_steps, units=(3, 2))
    path = filled(trace.header, tmp_path / "new" / "folder", trace)
    assert path.read_bytes() == write_trace(trace, tmp_path).path.read_bytes()


def test_nothing_has_its_name_until_it_is_whole(make_trace: Any, tmp_path: Path) -> None:
    trace = make_trace()
    with trace_on_disk(trace.header, tmp_path):
        (partial,) = tmp_path.iterdir()
        assert partial.name.endswith(".safetensors.partial")
        # Its place is taken before anything is measured.
        assert partial.stat().st_blocks * 512 >= sum(array.nbytes for array in trace.arrays().values())
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_after_an_error_the_trace_that_was_there_is_there(make_trace: Any, tmp_path: Path, error: Any) -> None:
    before = write_trace(make_trace(seed=1), tmp_path).path.read_bytes()

    def interrupted() -> None:
        with trace_on_disk(make_trace(seed=2).header, tmp_path) as lying:
            lying.overlap[:] = 1
            raise error

    with pytest.raises(error):
        interrupted()
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == before


def test_a_full_disk_is_told_before_anything_is_measured(
    make_trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            if set(data) == {0}:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(stock(path, mode)))
    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        trace_on_disk(make_trace().header, tmp_path),
    ):
        pytest.fail("measured in vain")
    assert raised.value.filename == str(tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_not_filled_in_is_zero(make_trace: Any, tmp_path: Path) -> None:
    trace = make_trace()
    with trace_on_disk(trace.header, tmp_path) as lying:
        lying.fresh_mass[:] = 0.5
    found = TraceFile(tmp_path / "one.safetensors").load()
    assert (found.fresh_mass == 0.5).all()
    assert not any(np.any(array) for name, array in found.arrays().items() if name != "fresh_mass")
