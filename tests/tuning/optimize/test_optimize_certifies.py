"""`--max-kl`: the cheapest policy that certifies a limit, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import BudgetConstrained, PolicyFile
from tuning.certify.certificate import KlLimit, certify

# A `Run` of the conftest, which a test module cannot import.
Run = Any
Optimize = Callable[..., Run]

# The random model loses nats where a trained one loses hundredths. Six prompts suffice as the cap is low.
LIMIT, CAP = 1.7, 4.0
ASKED = ("--max-kl", LIMIT, "--kl-cap", CAP)
FAMILIES = ("--families", "stride_profile,fixed_stride", "--trials", 2)


@pytest.fixture(scope="module")
def traces(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the traces, which gets a sensitivity of its own."""
    return Path(shutil.copytree(recorded, tmp_path_factory.mktemp("copied") / "traces"))


@pytest.fixture(scope="module")
def certified_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `certified`."""
    return tmp_path_factory.mktemp("certified") / "results"


@pytest.fixture(scope="module")
def certified(certified_out: Path, traces: Path, optimize: Optimize) -> Run:
    """A run with a limit, on the traces of the first one."""
    return optimize("--traces", traces, "--out", certified_out, *ASKED, *FAMILIES)


def test_the_cheapest_certified_policy_is_exported(certified: Run, certified_out: Path) -> None:
    assert certified.code == 0, certified.err
    results = json.loads((certified_out / "results.json").read_text())
    ladder = results["ladder"]
    assert [rung["budget"] for rung in ladder] == [0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02]
    passed = [rung for rung in ladder if rung["certificate"]["certified"]]
    assert passed == ladder[: len(passed)]
    assert 0 < len(passed) < len(ladder)
    assert ladder[len(passed)]["certificate"]["kl_bound"] > LIMIT
    assert certified.result["budget"] == results["budget"] == passed[-1]["budget"]
    assert results["families"][0]["label"] == passed[-1]["label"]
    assert certified.result["certificate"] == passed[-1]["certificate"]


def test_the_certificate_follows_from_the_kl_of_the_held_out_prompts(certified: Run, certified_out: Path) -> None:
    results = json.loads((certified_out / "results.json").read_text())
    kl = {one["label"]: one["per_prompt"]["kl"] for one in (*results["families"], *results["references"])}
    for rung in results["ladder"]:
        found = certify(np.array(kl[rung["label"]]), KlLimit(LIMIT, CAP, 0.9), n_policies=9).to_json()
        assert {**found, "certified": None} == {**rung["certificate"], "certified": None}
    assert len(results["held_out_prompts"]) == certified.result["certificate"]["n_prompts"] == 6


def test_the_policy_file_carries_its_certificate_and_keeps_its_budget(certified: Run, certified_out: Path) -> None:
    policy_file = PolicyFile.read(certified_out / "policy.json")
    assert policy_file.provenance["certificate"] == certified.result["certificate"]
    assert policy_file.provenance["budget"] == certified.result["budget"]
    assert isinstance(policy_file.policy, BudgetConstrained)
    assert policy_file.policy.mean_budget <= certified.result["budget"] * (1 + 1e-9)


def test_people_are_told_too(certified: Run, certified_out: Path) -> None:
    sentence = (
        f"prompts like the 6 measured lose at most {LIMIT:g} nats per step on average, each counted up to {CAP:g}"
    )
    assert sentence in " ".join(certified.out.split())
    assert sentence in " ".join((certified_out / "report.html").read_text().split())
    assert (certified_out / "pictures" / "certificate.png").exists()
    assert not list(certified_out.rglob("*.partial"))


def test_without_a_limit_nothing_is_certified(first: Run, out: Path) -> None:
    assert "certificate" not in first.result
    assert "certificate" not in PolicyFile.read(out / "policy.json").provenance
    assert not (out / "pictures" / "certificate.png").exists()


def test_with_a_limit_no_more_is_tried_than_the_budget_and_trials_are_shared(
    certified: Run, certified_out: Path, traces: Path, tmp_path: Path, optimize: Optimize
) -> None:
    folder = Path(shutil.copytree(certified_out, tmp_path / "results"))
    run = optimize("--traces", traces, "--out", folder, *ASKED, *FAMILIES, "--budget", 0.25)
    assert run.code == 0, run.err
    results = json.loads((folder / "results.json").read_text())
    assert [rung["budget"] for rung in results["ladder"]][:3] == [0.25, 0.2, 0.15]
    assert run.result["certificate"]["n_policies"] == 8
    # Two trials of two families, and no more for the second limit.
    assert (folder / "study.log").read_text().count('"op_code":4') == 4


def test_where_nothing_is_certified_there_is_one_sentence_and_no_policy(
    traces: Path, tmp_path: Path, optimize: Optimize
) -> None:
    families = ("--families", "stride_profile", "--trials", 2)
    run = optimize("--traces", traces, "--out", tmp_path, "--max-kl", 0.05, "--kl-cap", 0.1, *families)
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines()[-1] == (
        "error: no policy below full attention certifies a KL of at most 0.05 nats per step, prompts counted up to "
        "0.1, at 90% confidence: of stride_profile at 0.5, the most expensive, the bound is 0.1 on 6 prompts; no "
        "number of prompts that lose as these do would be enough."
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "study.log", "closed_loop"}


def test_too_few_prompts_are_refused_before_anything_is_recorded(
    model: Path, tmp_path: Path, optimize: Optimize, sizes: tuple[str, ...]
) -> None:
    run = optimize("--model", model, "--out", tmp_path / "results", *sizes, "--max-kl", 0.1)
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines() == [
        "error: 6 held-out prompts can never certify a KL of at most 0.1 nats per step, prompts counted up to 0.4, at "
        "90% confidence: at least 9 are needed, half of all that are recorded (--per-kind 4)."
    ]
    assert not (tmp_path / "results").exists()


def test_too_few_traces_are_refused_before_any_closed_loop(traces: Path, tmp_path: Path, optimize: Optimize) -> None:
    run = optimize("--traces", traces, "--out", tmp_path / "results", "--max-kl", 0.1, "--confidence", 0.99)
    assert (run.code, run.out) == (2, "")
    assert "6 held-out prompts can never certify" in run.err
    assert run.err.endswith("at least 17 are needed, half of all that are recorded (--per-kind 6).\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--max-kl", 0), "the limit of KL is a number of nats per step above 0, not 0."),
        (("--max-kl", "nan"), "above 0, not nan."),
        (("--max-kl", 0.1, "--kl-cap", 0.1), "the cap is 0.1, the limit 0.1."),
        (("--max-kl", 0.1, "--confidence", 95), "the confidence is a probability in [0.75, 1), not 95."),
        (("--max-kl", 0.1, "--budget", 2), "in (0, 1], not 2."),
        (("--confidence", 0.95), "--confidence 0.95 is of a certificate, but there is no --max-kl to certify."),
        (("--kl-cap", 0.5), "--kl-cap 0.5 is of a certificate, but there is no --max-kl to certify."),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(
    model: Path, tmp_path: Path, optimize: Optimize, arguments: tuple[object, ...], sentence: str
) -> None:
    run = optimize("--model", model, "--out", tmp_path / "results", *arguments)
    assert (run.code, run.out) == (2, "")
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(sentence)
    assert not (tmp_path / "results").exists()
