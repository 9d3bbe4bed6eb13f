"""A share of `make attack`; the whole of it is in docs/results/attack.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.attack.attacked import attacked  # noqa: E402
from benchmarks.attack.rows import ROWS  # noqa: E402

# Cases that take some seconds on a quiet core.
SHARE = {"Policies": 150, "Traces": 60, "Stores": 60, "Interrupts": 12, "Threads": 4, "NotNumbers": 4}


@pytest.mark.parametrize("row", SHARE)
def test_nothing_is_lost_and_nothing_let_in(row: str) -> None:
    # In a process of its own: alarms, forks and trace functions are of a whole process.
    assert attacked(row, 0, range(SHARE[row])) == []


def test_a_process_that_dies_is_a_finding() -> None:
    (found,) = attacked("NoSuchRow", 0, range(3))
    assert found == "the process ended with 1 among the cases 0 to 2"


def test_a_process_that_hangs_is_a_finding() -> None:
    # It has not even begun.
    assert attacked("Workers", 0, range(1), most_seconds=0.01) == ["case 0: no end after 0 s"]


def test_the_run_that_is_committed_has_every_row() -> None:
    result = json.loads((ROOT / "docs/results/attack.json").read_text(encoding="utf-8"))
    assert result["rows"].keys() == {row.name for row in ROWS}
