"""JSON of somebody else's: read within bounds, or refused in a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from policies.shown import shown

# Tables of 100 layers x 64 heads for a dozen features take a quarter of each.
MOST_BYTES = 4 * 2**20
MOST_VALUES = 200_000
# Policies nest one level each; provenance is free.
MOST_LEVELS = 32
# Beyond, a float64 no longer tells a whole number from the next one.
LARGEST_WHOLE = 2**53


def check_plain_file(path: Path | str) -> None:
    """Refuse what is there and no ordinary file, such as a FIFO or a device: reading it could wait for ever.

    Raises:
        ValueError: With the path.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no ordinary file.")


def read_json(path: Path | str, most_bytes: int = MOST_BYTES) -> Any:
    """The values of a JSON file.

    Args:
        path: The file, in UTF-8.
        most_bytes: How large it may be.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no ordinary file, too large, no JSON, or has a key twice in one object or a number that
            would be read as another one.
    """
    check_plain_file(path)
    with Path(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} is larger than {most_bytes:,} bytes.")
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def parse_json(text: str) -> Any:
    """The values of a text of JSON; see `read_json`.

    Raises:
        ValueError: With a clause.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_float)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from None


def json_problem(values: Any) -> str | None:
    """What makes JSON values unusable, as a clause; None if nothing does.

    They may nest 32 levels deep and be 200,000. Numbers must be finite, and whole ones at most 2**53 in size.
    """
    level, n_values = [values], 0
    for _ in range(MOST_LEVELS):
        n_values += len(level)
        if n_values > MOST_VALUES:
            return f"it holds more than {MOST_VALUES:,} values"
        for value in level:
            if isinstance(value, float) and not math.isfinite(value):
                return f"{value} is no number of JSON"
            if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
                return f"the whole number {shown(value)} is beyond 2**53"
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return None
    return f"it is nested deeper than {MOST_LEVELS} levels"


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return values


def _float(text: str) -> float:
    value = float(text)
    if value == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0]):
        raise ValueError(f"{shown(text)} is too small for a float64")
    return value
