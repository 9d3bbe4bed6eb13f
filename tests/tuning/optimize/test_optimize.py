from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies import BudgetConstrained, PolicyFile, Selection
from recycler import load_model, model_shape, recycled, run_closed_loop
from recycler.model.weights_digest import weights_sample
from recycler.prompts import Prompt, default_prompts
from traces import TraceFolder
from tuning import FAMILIES, TraceBatch, replay_policy
from tuning.search.split import split_by_prompt

# A `Run` of the conftest, which a test module cannot import.
Run = Any

BUDGET, K = 0.2, 48


@pytest.fixture(scope="module")
def held_out(model: Path) -> Sequence[Prompt]:
    tokenizer = load_model(str(model), device="cpu").tokenizer
    return split_by_prompt(default_prompts(tokenizer, n_per_kind=2, context_tokens=160, n_steps=12)).held_out


def test_the_last_line_is_the_result(first: Run, out: Path) -> None:
    assert first.code == 0, first.err
    result = first.result
    assert {"policy", "family", "budget", "full_share", "kl", "kl_fixed_stride", "agreement", "traces"} <= set(result)
    assert (result["policy"], result["traces"]) == (str(out / "policy.json"), str(out / "traces"))
    assert (result["budget"], result["held_out_prompts"]) == (BUDGET, 6)
    assert result["family"] in FAMILIES
    assert 0 < result["full_share"] <= BUDGET
    assert result["kl"] > 0
    assert result["kl_fixed_stride"] > 0
    assert 0 <= result["agreement"] <= 1
    ratio, low, high = result["kl_ratio"]
    assert ratio == pytest.approx(result["kl"] / result["kl_fixed_stride"])
    assert low <= ratio <= high
    # Before it, a table for people; progress goes elsewhere.
    assert all(name in first.out for name in FAMILIES)
    assert all(stage in first.err for stage in ("recording", "sensitivity", "confirming winners", *FAMILIES))


def test_everything_promised_is_there(first: Run, out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        *("policy.json", "results.json", "report.html", "pictures", "study.log", "closed_loop", "set_sizes", "traces"),
        ".lock",
    }
    # What is held out is decoded, not recorded.
    assert {file.name[-4:] for file in TraceFolder(out / "traces")} == {"-000"}
    assert len(TraceFolder(out / "traces")) == 6
    assert len(list(out.glob("set_sizes/*/sensitivity.json"))) == 1
    assert not list(out.rglob("*.partial"))
    results = json.loads((out / "results.json").read_text())
    assert results["exported"] == first.result["family"]
    assert {family["family"] for family in results["families"]} == set(FAMILIES)


def test_the_family_that_did_best_on_tuning_prompts_is_exported(
    first: Run, out: Path, held_out: Sequence[Prompt]
) -> None:
    results = json.loads((out / "results.json").read_text())
    tuning_kl = {family["family"]: family["tuning_kl"] for family in results["families"]}
    assert first.result["family"] == min(tuning_kl, key=lambda name: tuning_kl[name])
    names = [prompt["name"] for prompt in results["held_out_prompts"]]
    assert names == [prompt.name for prompt in held_out]
    assert set(names).isdisjoint(results["tuning_prompts"])


def test_the_policy_file_says_where_it_came_from(
    first: Run, out: Path, model: Path, held_out: Sequence[Prompt]
) -> None:
    policy_file = PolicyFile.read(out / "policy.json")
    assert dataclasses.replace(policy_file.selection, unit_k=None) == Selection.unpooled(K)
    assert np.mean(policy_file.selection.unit_k) <= K
    assert policy_file.horizon_steps == 12
    loaded = load_model(str(model), device="cpu")
    assert policy_file.model == model_shape(loaded.model, loaded.id)
    provenance = policy_file.provenance
    tuned_on = [file.digest() for file in TraceFolder(out / "traces")]
    assert sorted(provenance["traces"]) == sorted(tuned_on)
    assert policy_file.weights == weights_sample(loaded.model)
    assert provenance["closed_loop"]["prompts"] == [prompt.name for prompt in held_out]
    assert (provenance["budget"], provenance["family"]) == (BUDGET, first.result["family"])
    assert provenance["closed_loop"]["kl"]["value"] == first.result["kl"]


def test_the_numbers_are_those_of_the_policy_on_held_out_prompts(
    first: Run, out: Path, model: Path, held_out: Sequence[Prompt]
) -> None:
    file = PolicyFile.read(out / "policy.json")
    loaded = load_model(str(model), device="cpu")
    runs = [run_closed_loop(loaded.model, prompt.tokens, 160, [file.policy], file.selection) for prompt in held_out]
    assert first.result["kl"] == pytest.approx(np.mean([run.kl for run in runs]), rel=1e-3)
    assert first.result["agreement"] == pytest.approx(np.mean([run.agreement for run in runs]))
    assert first.result["full_share"] == pytest.approx(np.mean([run.full for run in runs]), abs=0.01)
    replay = replay_policy(TraceBatch(list(TraceFolder(out / "traces"))), file.policy)
    assert first.result["recovered_mass"] == pytest.approx(replay.recovered_mass)


def test_the_policy_runs_within_its_budget(first: Run, out: Path, model: Path, held_out: Sequence[Prompt]) -> None:
    policy_file = PolicyFile.read(out / "policy.json")
    assert isinstance(policy_file.policy, BudgetConstrained)
    assert policy_file.policy.mean_budget <= BUDGET * (1 + 1e-9)
    loaded = load_model(str(model), device="cpu")
    prompt = torch.from_numpy(held_out[0].tokens[:160].astype(np.int64))[None]
    with recycled(loaded.model, policy_file.policy, policy_file.selection) as session:
        loaded.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    receipt = session.receipt()
    assert receipt.n_steps == 59
    assert 0 < receipt.full_share <= BUDGET
    assert (receipt.full_steps <= np.asarray(policy_file.policy.budget) * 59 + 1e-6).all()


def test_of_several_candidates_the_one_that_does_best_in_closed_loop_wins(
    first: Run, out: Path, copied: Path, model: Path, optimize: Callable[..., Run], sizes: tuple[str, ...]
) -> None:
    def tuning_kl(folder: Path) -> np.ndarray:
        families = json.loads((folder / "results.json").read_text())["families"]
        return np.array([kl for _, kl in sorted((family["family"], family["tuning_kl"]) for family in families)])

    run = optimize("--model", model, "--out", copied, "--budget", BUDGET, *sizes, "--candidates", 1)
    assert run.code == 0, run.err
    best_of_two, best_in_replay = tuning_kl(out), tuning_kl(copied)
    assert (best_of_two <= best_in_replay * (1 + 1e-4)).all()
    assert (best_of_two < best_in_replay * (1 - 1e-4)).any()
