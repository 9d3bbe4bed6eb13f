"""Rows that join those of a committed JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def measured_elsewhere(known: Mapping[str, Any], found: Mapping[str, Any], rows: str) -> dict[str, str]:
    """What new rows say of their machine: its name, if it is not that of the known ones.

    Args:
        known: The file.
        found: Of this run.
        rows: Where the rows of either are.

    Raises:
        ValueError: If anything else differs: then the rows are not of one table.
    """
    for name in found.keys() - {rows, "machine"}:
        if found[name] != known[name]:
            raise ValueError(f"the rows that are known are of {name} {known[name]}, not {found[name]}.")
    return {} if found["machine"] == known["machine"] else {"machine": found["machine"]}
