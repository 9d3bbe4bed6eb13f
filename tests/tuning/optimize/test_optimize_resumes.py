"""A run goes on where another one stopped, and starts from what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recycler.measure.ablation
import recycler.measure.closed_loop
import recycler.record.folder
import recycler.record.size_losses
import tuning.optimize
from policies import PolicyFile
from traces import TraceFolder
from tuning.divide.allocation import STRIDES

# A `Run` of the conftest, which a test module cannot import.
Run = Any
Optimize = Callable[..., Run]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(monkeypatch: pytest.MonkeyPatch, *functions: str) -> None:
    def computed(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was computed before")

    for function in functions:
        monkeypatch.setattr(function, computed)


RECORDING = "recycler.record.folder.record_trace"
ABLATING = "recycler.measure.ablation.run_closed_loop"
COMPARING = "recycler.measure.closed_loop.run_closed_loops"


def trials(folder: Path) -> dict[str, int]:
    results = json.loads((folder / "results.json").read_text())
    return {family["family"]: len(family["trials"]["loss"]) for family in results["families"]}


class Interrupts:
    """Lets some calls of a function through, then interrupts."""

    def __init__(self, function: Callable[..., Any], n_calls: int) -> None:
        self.function, self.n_left = function, n_calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.n_left == 0:
            raise KeyboardInterrupt
        self.n_left -= 1
        return self.function(*arguments, **options)


def test_a_second_run_computes_nothing_anew(
    copied: Path, first: Run, model: Path, optimize: Optimize, sizes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, RECORDING, ABLATING, COMPARING)
    before = contents(copied)
    again = optimize("--model", model, "--out", copied, "--budget", 0.2, *sizes)
    assert (again.code, again.found) == (0, first.found), again.err
    after = contents(copied)
    assert after.keys() == before.keys()
    # Optuna notes that it opened a study.
    assert {name for name in before if after[name] != before[name]} <= {"study.log"}
    assert set(trials(copied).values()) == {2}
    assert "recording" not in again.err


def test_a_run_that_is_interrupted_at_every_stage_ends_as_if_uninterrupted(
    tmp_path: Path,
    out: Path,
    first: Run,
    model: Path,
    optimize: Optimize,
    sizes: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--model", model, "--out", tmp_path / "again", "--budget", 0.2, *sizes)
    stages = [
        (recycler.measure.ablation, "unit_sensitivity", 3),
        (recycler.record.size_losses, "_lost_by_size", 2),
        (recycler.record.folder, "record_trace", 4),
        (tuning.optimize, "search_family", 4),
        # One run of six prompts chooses winners, one confirms them, and one confirms clocks with pooled sets.
        (recycler.measure.closed_loop, "run_closed_loops", 0),
        (recycler.measure.closed_loop, "run_closed_loops", 1),
        (recycler.measure.closed_loop, "run_closed_loops", 1),
        (tuning.optimize, "write_report", 0),
    ]
    for module, function, n_calls in stages:
        interrupts = Interrupts(getattr(module, function), n_calls)
        with monkeypatch.context() as patched:
            patched.setattr(module, function, interrupts)
            run = optimize(*arguments)
        assert (run.code, run.err.splitlines()[-1], interrupts.n_left) == (130, "interrupted", 0)
        assert run.out == ""
        assert not (tmp_path / "again" / "report.html").exists()
    run = optimize(*arguments)
    assert (run.code, run.found) == (0, first.found), run.err
    ours, theirs = contents(tmp_path / "again"), contents(out)
    assert ours.keys() == theirs.keys()
    (sensitivity,) = (file for file in theirs if file.endswith("sensitivity.json"))
    for file in ("policy.json", "results.json", "report.html", sensitivity):
        assert ours[file] == theirs[file]


def test_a_study_goes_on_to_more_trials(
    copied: Path, model: Path, optimize: Optimize, sizes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, RECORDING, ABLATING)
    run = optimize(
        "--model", model, "--out", copied, "--budget", 0.2, *sizes, "--trials", 4, "--families", "cosine_profile"
    )
    assert run.code == 0, run.err
    assert trials(copied) == {"cosine_profile": 4}
    assert "2/4" in run.err


def test_another_budget_shares_traces_but_no_trials(
    copied: Path, model: Path, optimize: Optimize, sizes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, RECORDING, ABLATING)
    run = optimize("--model", model, "--out", copied, "--budget", 0.4, *sizes, "--families", "stride_profile")
    assert run.code == 0, run.err
    assert trials(copied) == {"stride_profile": 2}
    assert run.result["full_share"] <= 0.4
    assert PolicyFile.read(copied / "policy.json").provenance["budget"] == 0.4


def test_traces_that_are_there_are_used_with_the_model_that_they_name(
    recorded: Path, first: Run, tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, RECORDING)
    traces = shutil.copytree(recorded, tmp_path / "traces")
    families = "fixed_stride, cosine_profile"
    arguments = ("--traces", traces, "--budget", 0.2, "--trials", 2, "--families", families, "--candidates", 1)
    run = optimize(*arguments, "--out", tmp_path / "deep" / "results")
    assert run.code == 0, run.err
    assert run.result["traces"] == str(traces)
    assert trials(tmp_path / "deep" / "results") == {"fixed_stride": 2, "cosine_profile": 2}
    assert run.result["kl_fixed_stride"] == pytest.approx(first.result["kl_fixed_stride"])
    assert not (tmp_path / "deep" / "results" / "traces").exists()
    assert len(TraceFolder(traces)) == 12


@pytest.mark.parametrize(
    ("budget", "families"), [(1, ""), (0.005, "stride_profile"), (1 / STRIDES[-1], "logistic_profile")]
)
def test_the_ends_of_the_range_of_budgets_give_a_result(
    copied: Path, model: Path, optimize: Optimize, sizes: tuple[str, ...], budget: float, families: str
) -> None:
    run = optimize("--model", model, "--out", copied, "--budget", budget, *sizes, "--families", families)
    assert run.code == 0, run.err
    assert run.result["full_share"] <= budget
    json.loads((copied / "policy.json").read_text(), parse_constant=pytest.fail)
    if budget == 1:
        assert (run.result["kl"], run.result["kl_ratio"]) == (pytest.approx(0, abs=1e-6), None)


def test_sets_that_hold_the_whole_context_give_a_result_in_which_nothing_is_lost(
    model: Path, tmp_path: Path, optimize: Optimize, sizes: tuple[str, ...]
) -> None:
    families = ("--families", "stride_profile,cosine_threshold")
    run = optimize("--model", model, "--out", tmp_path, "--budget", 0.2, *sizes, "--k", 200, *families)
    assert run.code == 0, run.err
    assert run.result["kl"] == pytest.approx(0, abs=1e-6)
    assert run.result["kl_ratio"] is None


def test_results_can_be_repeated_elsewhere(
    tmp_path: Path, out: Path, first: Run, model: Path, optimize: Optimize, sizes: tuple[str, ...]
) -> None:
    store = f"sqlite:///{tmp_path}/trials.db"
    run = optimize("--model", model, "--out", tmp_path / "b", "--budget", 0.2, *sizes, "--storage", store)
    assert (run.code, run.found) == (0, first.found), run.err
    assert (tmp_path / "b" / "policy.json").read_bytes() == (out / "policy.json").read_bytes()
    assert not (tmp_path / "b" / "study.log").exists()
