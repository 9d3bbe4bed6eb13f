from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from traces.reporting.folder_lock import folder_locked


def hold(folder: Path, told: Connection) -> None:
    with folder_locked(folder):
        told.send(os.getpid())
        told.recv()


def test_a_folder_in_use_is_refused_with_its_holder_and_free_when_that_was_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    pid = ours.recv()
    in_use = rf"^{tmp_path} is in use by process {pid} on {socket.gethostname()} since .*: wait for it, or choose"
    with pytest.raises(ValueError, match=in_use), folder_locked(tmp_path):
        pass
    other.kill()
    other.join()
    with folder_locked(tmp_path):
        pass


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_locked(tmp_path):
        raise KeyError
    with folder_locked(tmp_path):
        pass
