"""Cases of a row, in a process of its own."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.attack.row import Row
from benchmarks.attack.rows import ROWS


def attacked(name: str, seed: int, cases: range) -> list[str]:
    """Findings of some cases of a row, in a process of its own; one that ends otherwise is a finding."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=attack, args=(name, seed, cases, sender))
    process.start()
    sender.close()
    found: list[str] = []
    try:
        while (told := receiver.recv()) is not None:
            found.append(told)
    except EOFError:
        process.join()
        found.append(f"the process ended with {process.exitcode} among the cases {cases.start} to {cases.stop - 1}")
    process.join()
    return found


def attack(name: str, seed: int, cases: range, tell: Any) -> None:
    """Run cases of a row and tell findings, then None."""
    row_type = next(row for row in ROWS if row.__name__ == name)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        for found in findings(row_type(Path(folder)), seed, cases):
            tell.send(found)
    tell.send(None)


def findings(row: Row, seed: int, cases: range) -> list[str]:
    """What cases of a row find; each has a seed of its own."""
    found = []
    for number in cases:
        wrong = row.case(random.Random(f"{seed} {type(row).__name__} {number}"))
        if wrong:
            found.append(f"case {number}: {wrong[:500]}")
    return found
