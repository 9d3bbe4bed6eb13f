"""The benchmark for a GPU that is there for minutes, rehearsed where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[4]


@pytest.fixture
def command(benchmark_module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a benchmark beside the others, which it imports by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return benchmark_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses for a GPU")
def test_stages_run_identities_hold_and_a_second_run_goes_on(
    command: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, out = command("gpu"), tmp_path / "gpu.json"
    identities = sys.modules["gpu_identities"]
    # The others are engines' contract; here it counts that the claims are asked.
    monkeypatch.setattr(identities, "_POLICIES", identities._POLICIES[-1:])
    first = plan.main(minutes=8, out=out, only=["identities", "recording"])
    assert (first["failed"], first["identities_that_fail"]) == ([], [])
    before = json.loads(out.read_text())["stages"]
    assert len(before["identities"]) == 12
    second = plan.main(
        minutes=8, out=out, only=["bandwidth", "identities", "beside stock, batch 1", "exact, batch 1", "attention"]
    )
    assert second["failed"] == []
    after = json.loads(out.read_text())
    assert after["rehearsed"]
    assert after["stages"].items() > before.items()
    rows = {row["case"]: row for row in after["stages"]["beside stock, batch 1 x 50"]}
    assert rows["engine, never full"]["engine"] == "cuda"
    assert rows["generate"]["engine"] == "transformers"
    assert after["stages"]["exact, batch 1 x 50"][-1]["acceptance"] == "simulated"


def test_the_page_is_what_was_measured(command: Callable[[str], Any]) -> None:
    runs = json.loads((ROOT / "docs" / "results" / "gpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "gpu_measured.md").read_text(encoding="utf-8")
    assert page == command("gpu_report").report(runs)
    # A run in which one does not hold is not published.
    assert all(row["holds"] for run in runs for row in run["stages"].get("identities", ()))
