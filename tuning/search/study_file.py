"""The file that keeps a study, and what a full disk or a killed process left at its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock


def study_storage(path: Path) -> JournalStorage:
    """Open the file, or begin one. A last line that was not written whole is cut off, which is told.

    Raises:
        ValueError: If a line before the last is damaged.
    """
    if path.exists():
        _repair(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _repair(path: Path) -> None:
    lock = JournalFileSymlinkLock(str(path))
    # Another process may be in the middle of a line.
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        damaged = next((number for number, line in enumerate(lines) if not _is_whole(line)), None)
        if damaged is None:
            return
        if damaged < len(lines) - 1:
            raise ValueError(f"{path} is damaged in line {damaged + 1}: remove it, and the search begins anew.")
        with path.open("rb+") as file:
            file.truncate(sum(map(len, lines[:damaged])))
    finally:
        lock.release()
    print(f"note: the last line of {path} was not written whole, and was cut off.", file=sys.stderr)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
