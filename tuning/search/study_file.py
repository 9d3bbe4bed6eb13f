"""The file that keeps a study, and what a full disk or a killed process left at its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from policies.shown import sentence
from policies.strict_json import check_plain_file


def study_storage(path: Path) -> JournalStorage:
    """Open the file, or begin one. A last line that was not written whole is cut off, which is told.

    A file that is damaged before its last line is set aside under another name, which is told, and another one begun.

    Raises:
        ValueError: If it is no ordinary file.
    """
    check_plain_file(path)
    if path.exists():
        _repair(path)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:
        # Optuna believes whatever JSON says: what a line of another form raises is not foreseen.
        _set_aside(path, f"{type(error).__name__}: {error}")
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
            _set_aside(path, f"line {damaged + 1} is no JSON")
            return
        with path.open("rb+") as file:
            file.truncate(sum(map(len, lines[:damaged])))
    finally:
        lock.release()
    print(f"note: the last line of {path} was not written whole, and was cut off.", file=sys.stderr)


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    note = f"note: {path} is damaged ({why}): it was set aside as {aside.name}, and the search begins anew."
    print(sentence(note), file=sys.stderr)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.endswith(b"\n")
