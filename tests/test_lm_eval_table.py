"""What docs say of lm-eval's tasks is what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_benchmark_writes_of_its_json() -> None:
    spec = importlib.util.spec_from_file_location("lm_eval_report", ROOT / "benchmarks" / "lm_eval_report.py")
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    result = json.loads((ROOT / "docs" / "results" / "lm-eval.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8") == report.page(result)
