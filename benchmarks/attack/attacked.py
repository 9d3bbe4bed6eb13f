"""Cases of a row, in a process of its own."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.attack.row import Row
from benchmarks.attack.rows import ROWS

# No case takes as long, a row's beginning included.
_MOST_SECONDS = 600


def attacked(name: str, seed: int, cases: range, most_seconds: float = _MOST_SECONDS) -> list[str]:
    """Findings of some cases of a row, in a process of its own; one that ends otherwise, or hangs, is a finding."""
    # Of a server that has imported all and done nothing: a process of its own in milliseconds, without any threads.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([attack.__module__])
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=attack, args=(name, seed, cases, sender))
    process.start()
    sender.close()
    found: list[str] = []
    try:
        for number in cases:
            if not receiver.poll(most_seconds):
                process.kill()
                found.append(f"case {number}: no end after {most_seconds:.0f} s")
                break
            found += [told] if (told := receiver.recv()) else []
    except EOFError:
        process.join()
        found.append(f"the process ended with {process.exitcode} among the cases {cases.start} to {cases.stop - 1}")
    process.join()
    return found


def attack(name: str, seed: int, cases: range, tell: Any) -> None:
    """Run cases of a row and tell of each what it found, which is mostly nothing."""
    row_type = next(row for row in ROWS if row.__name__ == name)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        for found in findings(row_type(Path(folder)), seed, cases):
            tell.send(found)


def findings(row: Row, seed: int, cases: range) -> Iterator[str | None]:
    """What each case of a row finds; each has a seed of its own."""
    for number in cases:
        wrong = row.case(random.Random(f"{seed} {type(row).__name__} {number}"))
        yield f"case {number}: {wrong[:500]}" if wrong else None
