"""Calling what is attacked, within bounds of time and memory."""

from __future__ import annotations

import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10
BYTES = 2 * 2**30
MOST_CHARACTERS = 300


class Alarm(BaseException):
    """It took too long; no handler of exceptions swallows it."""


def guarded(call: Callable[[], Any], seconds: float = SECONDS) -> tuple[Any, str | None]:
    """What a call gives, None if it refused; and what is wrong with how it ended, None if nothing is.

    It may refuse by a ValueError of one line of at most 300 characters. Anything else is wrong: another exception, a
    warning of NumPy, more than so many seconds or 2 GiB.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + BYTES, hard))
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            return call(), None
    except ValueError as error:
        return None, _wrong_sentence(str(error))
    except (Alarm, Exception) as error:
        return None, f"{type(error).__name__}: {str(error)[:120]} in {_where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _wrong_sentence(text: str) -> str | None:
    if not 1 <= len(text) <= MOST_CHARACTERS:
        return f"a refusal of {len(text)} characters: {text[:80]} ... {text[-40:]}"
    return None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/attack/" not in frame.filename and "site-packages" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def _ring(*_: object) -> None:
    raise Alarm("too long")


def _data_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024
