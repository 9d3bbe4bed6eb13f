"""One process at a time in a folder of results."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK, _HOLDER = ".lock", ".lock.holder"


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other process computes the same into it at the same time.

    The system lets go of it when the process ends, however it ends.

    Args:
        folder: A folder that is there.

    Raises:
        ValueError: If another process holds it; who, and since when.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by {_holder(folder)}: wait for it, or choose another folder.") from None
    try:
        (folder / _HOLDER).write_text(
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}", encoding="utf-8"
        )
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        return (folder / _HOLDER).read_text(encoding="utf-8", errors="replace")[:100] or "another process"
    except OSError:
        return "another process"
