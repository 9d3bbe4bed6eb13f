"""What docs say of exact decoding's texts is what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FOUND: dict[str, Any] = json.loads((DOCS / "results" / "exact-texts.json").read_text(encoding="utf-8"))


def test_the_page_on_ways_has_the_table_of_the_json(benchmark_module: Callable[[str], Any]) -> None:
    lines = (DOCS / "ways.md").read_text(encoding="utf-8").splitlines()
    table = benchmark_module("exact_texts_report").table(FOUND)
    assert len(table) > 6
    assert lines[lines.index(table[0]) :][: len(table)] == table


def test_every_text_is_stock_generates_and_in_bfloat16_the_engines_own_but_for_ties() -> None:
    by_way = {way: [row for row in FOUND["texts"] if row["way"] == way] for way in ("greedy", "drawn", "bfloat16")}
    assert [len(rows) for rows in by_way.values()][:2] == [60, 60]
    assert {row["beside_stock"] for way in ("greedy", "drawn") for row in by_way[way]} == {"equal"}
    beside_full = [row["beside_full"].partition(" at ")[0] for row in by_way["bfloat16"]]
    assert set(beside_full) <= {"equal", "a tie"}
    log = (DOCS / "LOG.md").read_text(encoding="utf-8")
    assert f"In bfloat16 {beside_full.count('equal')} of {len(beside_full)} greedy texts are those of the same" in log
