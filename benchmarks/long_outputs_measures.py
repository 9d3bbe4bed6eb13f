"""What is read out of a JSON file of `benchmarks/long_outputs.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]
TUNED, FULL = "tuned on 512 steps", "full attention"


def read_result(path: Path) -> Result:
    """A file's values."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def better_stride(rows: Mapping[str, Row]) -> Row:
    """The stride with least KL."""
    return min((row for name, row in rows.items() if name.startswith("stride")), key=lambda row: float(row["kl"]))


def kl_share(row: Row, of: Row) -> float:
    """KL as a share of another row's."""
    return float(row["kl"] / of["kl"])


def worst_kind(row: Row, of: Row) -> tuple[str, float]:
    """The kind of text at which that share is largest, and the share."""
    shares = {kind: kl_share(values, of["kinds"][kind]) for kind, values in row["kinds"].items()}
    worst = max(shares, key=lambda kind: shares[kind])
    return worst, shares[worst]


def last_over_first(row: Row) -> float:
    """KL in the last quarter of the output over that in the first; of what is full attention's own it means nothing."""
    quarters = row["quarters"]
    return float(quarters[-1] / max(quarters[0], 1e-9))


def copying_share(row: Row, full: Row) -> float:
    """Accuracy of the next token on copied text, as a share of full attention's; NaN where none was copied."""
    if "copying" not in row["kinds"]:
        return float("nan")
    return float(row["kinds"]["copying"]["accuracy"] / full["kinds"]["copying"]["accuracy"])
