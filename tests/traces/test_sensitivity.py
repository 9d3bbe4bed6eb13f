from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import TraceFolder
from traces.sensitivity import FILE_NAME, FORMAT, Sensitivity

MODEL = {"id": "tiny", "layers": 2, "kv_heads": 3, "query_heads": 6, "head_dim": 8, "dtype": "float32"}
KL = {"code-000": np.linspace(0, 1, 6).reshape(2, 3), "prose-000": np.full((2, 3), 1 / 3)}
ONE = Sensitivity(MODEL, {"k": 64, "group": "max"}, 32, KL, {"code-000": "abc"})


def values(**changed: Any) -> dict[str, Any]:
    tables = {name: table.tolist() for name, table in KL.items()}
    plain = {"format": FORMAT, "model": MODEL, "selection": {"k": 64}, "n_steps": 32, "kl": tables} | changed
    plain = {"measured_on": {}, **plain}
    return digested({name: value for name, value in plain.items() if value is not None})


def digested(plain: dict[str, Any]) -> dict[str, Any]:
    return plain | {"digest": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def put(folder: Path, text: str | bytes) -> None:
    (folder / FILE_NAME).write_bytes(text.encode() if isinstance(text, str) else text)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert ONE.write(tmp_path) == tmp_path / "sensitivity.json"
    read = Sensitivity.read(tmp_path)
    assert read is not None
    assert (read.model, read.selection, read.n_steps) == (MODEL, {"k": 64, "group": "max"}, 32)
    assert (list(read.kl), read.measured_on) == (list(KL), {"code-000": "abc"})
    for name, table in KL.items():
        assert read.kl[name].dtype == np.float64
        np.testing.assert_array_equal(read.kl[name], table)


def test_writing_replaces_the_file_at_once_and_leaves_no_part_behind(tmp_path: Path) -> None:
    ONE.write(tmp_path)
    Sensitivity(MODEL, {}, 5, {}).write(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    read = Sensitivity.read(str(tmp_path))
    assert read is not None
    assert (read.n_steps, dict(read.kl)) == (5, {})


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ONE.write(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sensitivity(MODEL, {}, 5, {}).write(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_folder_without_the_file_has_none(tmp_path: Path) -> None:
    assert Sensitivity.read(tmp_path) is None
    assert Sensitivity.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        json.dumps(values())[:-40],
        b"\xff\xfe\x00",
        "null",
        "[]",
        '"text"',
        "{}",
        json.dumps(values(format="recycled-attention-trace/1")),
        json.dumps(values(format=None)),
        json.dumps(values(model=None)),
        json.dumps(values(model={"layers": 2})),
        json.dumps(values(model=[])),
        json.dumps(values(selection=None)),
        json.dumps(values(n_steps=None)),
        json.dumps(values(n_steps="many")),
        json.dumps(values(kl=None)),
        json.dumps(values(kl=[])),
        json.dumps(values(kl={"code-000": [[1, 2, 3]]})),
        json.dumps(values(kl={"code-000": [[1, 2], [3, 4], [5, 6]]})),
        json.dumps(values(kl={"code-000": [[1, 2, 3], [4, 5]]})),
        json.dumps(values(kl={"code-000": [["a", 2, 3], [4, 5, 6]]})),
        json.dumps(values(kl={"code-000": None})),
    ],
)
def test_a_damaged_or_foreign_file_is_none_and_named(tmp_path: Path, text: str | bytes) -> None:
    put(tmp_path, text)
    with pytest.warns(
        UserWarning, match=rf"{tmp_path / FILE_NAME} is no sensitivity file \(.*\): measuring it anew\.$"
    ):
        assert Sensitivity.read(tmp_path) is None


def test_a_table_of_another_shape_is_named_as_the_reason(tmp_path: Path) -> None:
    put(tmp_path, json.dumps(values(kl={"code-000": [[1, 2, 3]]})))
    with pytest.warns(UserWarning, match="do not have the model's 2 layers x 3 KV heads"):
        assert Sensitivity.read(tmp_path) is None


def test_a_file_that_was_edited_is_none_and_named(tmp_path: Path) -> None:
    path = ONE.write(tmp_path)
    path.write_text(path.read_text().replace("0.2", "0.3"))
    with pytest.warns(UserWarning, match="its numbers are not those that were written"):
        assert Sensitivity.read(tmp_path) is None


def test_it_is_no_trace_to_a_folder_of_traces(tmp_path: Path) -> None:
    ONE.write(tmp_path)
    with pytest.raises(ValueError, match="holds no traces"):
        TraceFolder(tmp_path)
