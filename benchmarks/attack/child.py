"""Children of this process, which have its modules and none of its threads."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.reporting.command import run_command

KILLED = -9


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code; that of a signal is negative.
        said: What it wrote to standard error.
        seconds: How long it took.
    """

    code: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that it wrote."""
        return (self.said.strip().splitlines() or [""])[-1][:300]


def fork(call: Callable[[], Any], log: Path, *, kill_after: float | None = None, most_seconds: float = 120) -> Ended:
    """Run a call in a child, and kill it after so many seconds; a call that raises ends with the code 70."""
    began = time.perf_counter()
    child = start(call, log)
    code = wait(child, kill_after if kill_after is not None else most_seconds)
    return Ended(code, log.read_text(errors="replace"), time.perf_counter() - began)


def start(call: Callable[[], Any], log: Path) -> int:
    """Begin a child; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        call()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int:
    """Wait for a child, and kill it after so many seconds; its exit code, negative for a signal."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_main(main: Callable[..., Any], *arguments: object) -> None:
    """Run a command as its own process would; ends in SystemExit."""
    run_command(main, [str(argument) for argument in arguments])
