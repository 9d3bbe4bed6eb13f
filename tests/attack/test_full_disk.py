"""The disk that is played where none may be mounted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.attack.child import fork  # noqa: E402
from benchmarks.attack.full_disk import fail_writes_after  # noqa: E402


def test_writes_fail_where_the_disk_is_full_and_nowhere_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def write() -> None:
        fail_writes_after(disk, 100)
        (disk / "fits").write_text("x" * 60)
        (tmp_path / "elsewhere").write_text("x" * 1000)
        with pytest.raises(OSError, match="No space left on device"), (disk / "bytes").open("wb") as file:
            file.write(b"x" * 41)
        with pytest.raises(OSError, match="No space left on device"):
            np.save(disk / "array.npy", np.zeros(50))
        (disk / "the rest").write_text("x" * 40)

    ended = fork(write, tmp_path / "log")
    assert ended.code == 0, ended.said
    sizes = {path.name: path.stat().st_size for path in disk.iterdir()}
    assert sizes == {"fits": 60, "bytes": 0, "array.npy": 0, "the rest": 40}
