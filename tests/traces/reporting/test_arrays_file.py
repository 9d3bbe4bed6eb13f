from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.reporting import arrays_file
from traces.reporting.arrays_file import read_arrays, write_arrays

ARRAYS = {"numbers": np.arange(6.0).reshape(2, 3), "text": np.array("as it was")}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_arrays(tmp_path / "deep" / "a.npz", ARRAYS)
    read = read_arrays(tmp_path / "deep" / "a.npz")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), n_cut=st.integers(0, 50))
def test_a_byte_changed_or_bytes_cut_are_never_read_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, n_cut: int
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - n_cut])
    try:
        read = read_arrays(path)
    except ValueError:
        return
    assert {name: array.tolist() for name, array in read.items()} == {
        name: array.tolist() for name, array in ARRAYS.items()
    }


def test_a_file_that_was_made_with_other_numbers_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", ARRAYS)
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tmp_path / "b.npz", **arrays | {"numbers": arrays["numbers"] + 1})
    with pytest.raises(ValueError, match="its arrays are not those that were written"):
        read_arrays(tmp_path / "b.npz")


def test_few_bytes_that_claim_to_be_many_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays_file, "_MOST_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("numbers.npy", bytes(10**6 + 1))
    with pytest.raises(ValueError, match="it unpacks to more than 1,000,000 bytes"):
        read_arrays(tmp_path / "a.npz")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="is no ordinary file"):
        read_arrays(tmp_path / "a.npz")
