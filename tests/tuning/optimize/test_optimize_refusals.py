"""Bad input is one sentence on standard error, exit code 2, and nothing half done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

# A `Run` of the conftest, which a test module cannot import.
Run = Any
Optimize = Callable[..., Run]


@pytest.fixture
def traces(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the traces."""
    return Path(shutil.copytree(recorded, tmp_path / "traces"))


def refused(run: Run, sentence: str) -> None:
    assert (run.code, run.out) == (2, "")
    last = run.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--budget", "0"), "share of unit-steps that may run full, in (0, 1], not 0."),
        (("--budget", "1.5"), "in (0, 1], not 1.5."),
        (("--budget", "-1"), "in (0, 1], not -1."),
        (("--budget", "nan"), "in (0, 1], not nan."),
        (("--budget", "much"), "--budget"),
        (("--families", "magic"), "unknown family 'magic': known are fixed_stride, cosine_threshold"),
        (("--families", "fixed_stride,,magic"), "unknown family 'magic'"),
        (("--k", "30"), "k must hold the sinks and the window: k is 30, but sinks and window need 4 + 32 = 36 tokens."),
        (("--k", "10%"), "k is 16, but sinks and window need"),
        (("--k", "few"), "k is a number of tokens, as 128, or a share of the context, as 5%, not 'few'."),
        (("--k", "many%"), "not 'many%'."),
        (("--context-tokens", "309"), "309 tokens and 12 more are asked for, but the model has only 320 positions"),
        (("--context-tokens", "20"), "context_tokens must be at least 128"),
        (("--per-kind", "1"), "--per-kind"),
        (("--trials", "0"), "--trials"),
        (("--candidates", "0"), "--candidates"),
        (("--steps", "1"), "--steps"),
        (("--dtype", "int3"), "dtype 'int3' is not supported"),
        (("--device", "abacus"), "device 'abacus' is not usable"),
        (("--model", "/nowhere/at/all"), "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_made(
    model: Path,
    tmp_path: Path,
    optimize: Optimize,
    sizes: tuple[str, ...],
    arguments: tuple[str, str],
    sentence: str,
) -> None:
    run = optimize("--model", model, "--out", tmp_path / "results", *sizes, *arguments)
    refused(run, sentence)
    assert len(run.err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_folder_without_traces_is_refused(tmp_path: Path, optimize: Optimize) -> None:
    refused(optimize("--traces", tmp_path, "--out", tmp_path / "results"), f"{tmp_path} holds no traces")
    refused(optimize("--traces", tmp_path / "none", "--out", tmp_path / "results"), "is no folder of traces")
    assert not (tmp_path / "results").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, optimize: Optimize) -> None:
    save_file({"weight": np.zeros(3, dtype=np.float32)}, tmp_path / "model.safetensors")
    run = optimize("--traces", tmp_path, "--out", tmp_path / "results")
    refused(run, f"{tmp_path / 'model.safetensors'} is no trace")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["code-000", "technical-001"])
def test_a_truncated_trace_is_refused_by_name(
    traces: Path, tmp_path: Path, optimize: Optimize, name: str, keep: float
) -> None:
    path = traces / f"{name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    refused(optimize("--traces", traces, "--out", tmp_path / "results"), f"{path} is truncated or no safetensors file")
    assert not (tmp_path / "results").exists()


def test_a_truncated_trace_in_the_output_folder_is_refused_by_name(
    copied: Path, model: Path, optimize: Optimize, sizes: tuple[str, ...]
) -> None:
    path = copied / "traces" / "code-000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(optimize("--model", model, "--out", copied, *sizes), f"{path} is truncated")


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"layers": 3}, "(3 layers x 2 KV heads, 4 query heads of 8) is of another shape."),
        ({"kv_heads": 4}, "(2 layers x 4 KV heads, 4 query heads of 8) is of another shape."),
        # As many units, but other ones.
        ({"hidden_size": 64}, "(2 layers x 2 KV heads, 4 query heads of 16) is of another shape."),
    ],
)
def test_a_model_of_another_shape_than_the_traces_is_refused_with_both(
    traces: Path,
    tmp_path: Path,
    model: Path,
    make_model_folder: Callable[..., Path],
    optimize: Optimize,
    shape: dict[str, int],
    sentence: str,
) -> None:
    other = make_model_folder(tmp_path / "other", **shape)
    run = optimize("--traces", traces, "--model", other, "--out", tmp_path / "results")
    refused(run, f"the traces are of {model} (2 layers x 2 KV heads, 4 query heads of 8), but {other} {sentence}")
    assert not (tmp_path / "results").exists()


def test_traces_recorded_with_other_settings_are_not_mixed_with_new_ones(
    copied: Path, model: Path, optimize: Optimize, sizes: tuple[str, ...]
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    refused(optimize("--model", model, "--out", copied, *sizes, "--k", 50), "was recorded with k 48 instead of 50")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_one_prompt_of_each_kind_is_too_few(traces: Path, tmp_path: Path, optimize: Optimize) -> None:
    for path in traces.glob("*-001.safetensors"):
        path.unlink()
    run = optimize("--traces", traces, "--out", tmp_path / "results")
    refused(run, "6 prompts of 6 kinds are too few to hold any out: record at least two prompts of one kind.")
    assert not (tmp_path / "results").exists()


def test_a_damaged_sensitivity_is_measured_anew(traces: Path, tmp_path: Path, optimize: Optimize) -> None:
    (traces / "sensitivity.json").write_text("{}")
    with pytest.warns(UserWarning, match=f"{traces / 'sensitivity.json'} is no sensitivity file"):
        run = optimize("--traces", traces, "--out", tmp_path, "--families", "fixed_stride", "--trials", 1)
    assert run.code == 0, run.err


def test_a_file_is_no_output_folder(traces: Path, model: Path, tmp_path: Path, optimize: Optimize) -> None:
    (tmp_path / "taken").touch()
    refused(optimize("--traces", traces, "--out", tmp_path / "taken"), f"cannot write results to {tmp_path / 'taken'}")
    sizes = ("--context-tokens", "160", "--steps", "12", "--k", "48")
    refused(optimize("--model", model, "--out", tmp_path / "taken", *sizes), "cannot write results to")


def test_a_budget_below_the_longest_stride_is_refused(traces: Path, tmp_path: Path, optimize: Optimize) -> None:
    run = optimize(
        "--traces", traces, "--out", tmp_path / "results", "--budget", 0.0001, "--families", "cosine_profile"
    )
    refused(run, "a budget of 0.0001 is below one full step in")
