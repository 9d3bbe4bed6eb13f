"""Disks that are full: small ones where mounting is allowed, and else writes that fail."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from traces import trace_file


def mount_small_disk(folder: Path, n_bytes: int) -> bool:
    """Mount a disk of so many bytes over a folder, for this process and its children only; False if that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    user, group = os.getuid(), os.getgid()
    try:
        _check(libc.unshare(new_user | new_mounts))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
        resize(folder, n_bytes, flags=0)
    except OSError:
        return False
    return True


def resize(folder: Path, n_bytes: int, *, flags: int = 32) -> None:
    """Give a disk that was mounted here another size (32 remounts)."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={n_bytes}".encode()))


def fail_writes_after(folder: Path, n_bytes: int) -> None:
    """From here on, in this process, writes to files of a folder fail as on a full disk, after so many bytes of them.

    It is for files that Python opens. Traces, whose bytes a library in Rust writes, are written by Python here.
    """
    left = [n_bytes]

    class _File(io.FileIO):
        def write(self, data: Any) -> int:
            size = memoryview(data).nbytes
            if size > left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= size
            return super().write(data)

    stock = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        is_ours = isinstance(file, (str, Path)) and folder in Path(file).parents
        if not is_ours or not set(mode) & set("wax+"):
            return stock(file, mode, buffering, *text, **more)
        raw = _File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **more)

    def save_file(arrays: Any, path: Any, metadata: Any = None) -> None:
        with opened(path, "wb") as file:
            file.write(save(arrays, metadata))

    # Copies inside the kernel pass no file's `write`.
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    builtins.open = io.open = opened
    trace_file.save_file = save_file


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
