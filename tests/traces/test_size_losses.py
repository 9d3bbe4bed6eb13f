from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.reporting.arrays_file import write_arrays
from traces.size_losses import FILE_NAME, FORMAT, SetLosses, SizeLosses

MODEL = {"id": "tiny", "layers": 2, "kv_heads": 3, "query_heads": 6, "head_dim": 8, "dtype": "float32"}
LOST = {
    name: SetLosses(*np.random.default_rng(seed).random((2, 2, 4, 2, 3), dtype=np.float32))
    for seed, name in enumerate(["code-000", "prose-000"])
}
ONE = SizeLosses(MODEL, {"k": 64, "group": "max"}, (40, 64), LOST)


def put(folder: Path, **changed: Any) -> None:
    header = {"format": FORMAT, "model": MODEL, "selection": {"k": 64}, "sizes": [40, 64]} | changed
    arrays = {f"{field}: {name}": array for name, of in LOST.items() for field, array in of._asdict().items()}
    write_arrays(folder / FILE_NAME, {"header": json.dumps(header), **arrays})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert ONE.write(tmp_path / "made") == tmp_path / "made" / FILE_NAME
    read = SizeLosses.read(tmp_path / "made")
    assert read is not None
    assert (read.model, read.selection, read.sizes) == (MODEL, {"k": 64, "group": "max"}, (40, 64))
    assert list(read.lost) == list(LOST)
    for name, tables in LOST.items():
        for found, table in zip(read.lost[name], tables, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, table)


def test_a_folder_without_a_file_has_none(tmp_path: Path) -> None:
    assert SizeLosses.read(tmp_path) is None


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ONE.write(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SizeLosses(MODEL, {}, (64,), {}).write(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"sizes": [40, 64, 96]}, "its tables are not of 3 sizes, 2 layers and 3 KV heads"),
        ({"model": MODEL | {"layers": 5}}, "its tables are not of 2 sizes, 5 layers and 3 KV heads"),
        ({"model": {}}, "'layers'"),
    ],
    ids=str,
)
def test_a_foreign_file_is_none_and_says_what_is_wrong(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    put(tmp_path, **changed)
    with pytest.warns(UserWarning, match=rf"{message}.*measuring them anew\.$"):
        assert SizeLosses.read(tmp_path) is None


@pytest.mark.parametrize("n_bytes", [0, 10, 300])
def test_a_truncated_file_is_none_and_named(tmp_path: Path, n_bytes: int) -> None:
    path = ONE.write(tmp_path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.warns(UserWarning, match=r"size_losses\.npz is no file of size losses"):
        assert SizeLosses.read(tmp_path) is None
