"""`python -m tuning.optimize --budget 0.1`: from nothing but a budget to a policy that was confirmed in closed loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import typer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial
from rich.console import Console
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import FixedStride, ModelShape, PolicyFile, Selection, StepPolicy
from recycler.closed_loop_store import ClosedLoopStore
from recycler.model_shape import check_positions, model_shape
from recycler.models import LoadedModel, load_model
from recycler.prompts import default_prompts
from recycler.recorder import versions
from recycler.recording import record_prompts
from recycler.sensitivity import measure_sensitivity
from traces import TraceFile, TraceFolder
from traces.command import run_command
from tuning.allocation import STRIDES
from tuning.confirmation import measured
from tuning.families import FAMILIES, families_named
from tuning.report import write_report, write_results
from tuning.result_rows import kl_share
from tuning.results import FamilyResult, Measured, TuningResult
from tuning.split import Split, split_by_prompt
from tuning.study import Candidate, Search, search_family
from tuning.table import print_table
from tuning.trace_batch import TraceBatch
from tuning.tuning_data import TuningData, check_budget, unit_cost


def main(
    budget: Annotated[float, typer.Option(help="Share of unit-steps that may run full, in (0, 1].")] = 0.1,
    out: Annotated[Path, typer.Option(help="Folder for policy, report, study and traces.")] = Path("results"),
    traces: Annotated[
        Path | None, typer.Option(help="Folder of traces; default: record some into the output folder.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    families: Annotated[
        str, typer.Option(help=f"Families to tune, separated by commas; default: all of {', '.join(FAMILIES)}.")
    ] = "",
    trials: Annotated[int, typer.Option(help="Trials per family.", min=1)] = 40,
    candidates: Annotated[int, typer.Option(help="Candidates per family compared in closed loop.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts and search.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL for a shared study; default: a file in the output folder.")
    ] = None,
    k: Annotated[int, typer.Option(help="Tokens of the recycled set, where traces are recorded.")] = 128,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens, where traces are recorded.")] = 1536,
    steps: Annotated[int, typer.Option(help="Decode steps, where traces are recorded.", min=2)] = 64,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind, where traces are recorded.", min=2)] = 4,
) -> dict[str, Any]:
    """Record, tune every family at the budget, confirm the winners in closed loop, export the best policy."""
    began = time.perf_counter()
    check_budget(budget)
    chosen_families = families_named([name.strip() for name in families.split(",") if name.strip()])
    selection = Selection(k)
    files = list(TraceFolder(traces)) if traces is not None else []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    loaded = _load(model, files, dtype, device)
    shape = model_shape(loaded.model, loaded.id)
    trace_folder = traces or out / "traces"
    if traces is None:
        check_positions(loaded.model, context_tokens, steps)
        prompts = default_prompts(
            loaded.tokenizer, n_per_kind=per_kind, context_tokens=context_tokens, n_steps=steps, seed=seed
        )
        files = record_prompts(loaded, prompts, selection, trace_folder, max_age=steps)
    split = split_by_prompt(files)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write results to {out}: {error.strerror}.") from error
    sensitivity = measure_sensitivity(loaded, trace_folder, split.ablate)
    tune = TraceBatch(split.tune)
    data = TuningData(tune, budget, unit_cost(tune, sensitivity))

    trial_store = storage or JournalStorage(JournalFileBackend(str(out / "study.log")))
    identity = _identity(split, budget, data.unit_cost)
    searches = [
        search_family(
            family,
            data,
            n_trials=trials,
            n_candidates=candidates,
            seed=seed,
            storage=trial_store,
            study_name=f"{family.name}-{identity}",
        )
        for family in chosen_families
    ]
    store = ClosedLoopStore(out / "closed_loop")
    winners = _winners(store, loaded, split, searches)
    result = _confirm(store, loaded, shape, split, data, searches, winners)

    policy_path = out / "policy.json"
    _policy_file(result, split, seed).write(policy_path)
    write_results(result, out)
    report = write_report(result, out)
    print_table(result, Console())
    best = result.best.measured
    ratio = kl_share(result, best)
    return {
        "policy": str(policy_path),
        "family": result.best.family,
        "budget": budget,
        "full_share": best.full_share,
        "kl": best.kl.value,
        "kl_fixed_stride": result.baseline.kl.value,
        "kl_ratio": ratio and [ratio.value, ratio.low, ratio.high],
        "agreement": best.agreement.value,
        "agreement_fixed_stride": result.baseline.agreement.value,
        "recovered_mass": best.recovered_mass,
        "traces": str(trace_folder),
        "report": str(report),
        "held_out_prompts": len(split.held_out),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _load(model: str | None, files: Sequence[TraceFile], dtype: str, device: str | None) -> LoadedModel:
    """The model asked for, or that of the traces; they must agree in shape."""
    recorded = files[0].header.model if files else {}
    loaded = load_model(model or recorded.get("id"), dtype=dtype, device=device)
    shape = model_shape(loaded.model, loaded.id)
    if files:
        traced = ModelShape(**{field.name: recorded[field.name] for field in dataclasses.fields(ModelShape)})
        if dataclasses.replace(shape, id=traced.id) != traced:
            raise ValueError(f"the traces are of {traced}, but {shape} is of another shape.")
    return loaded


def _identity(split: Split, budget: float, cost: np.ndarray) -> str:
    """Short digest of all that a study's trials depend on."""
    parts = [file.digest() for file in split.tune] + [repr(budget), hashlib.sha256(cost.tobytes()).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _winners(
    store: ClosedLoopStore, loaded: LoadedModel, split: Split, searches: Sequence[Search]
) -> dict[str, tuple[Candidate, float]]:
    """The candidate of each family with the least closed-loop KL on the validation prompts, and that KL."""
    everyone = [(search.family, candidate) for search in searches for candidate in search.candidates]
    runs = [
        store.run(loaded, file, [candidate.policy for _, candidate in everyone])
        for file in tqdm(split.validate, desc="choosing winners", unit="prompt")
    ]
    kl = np.mean([run.kl.mean(1) for run in runs], axis=0)
    winners: dict[str, tuple[Candidate, float]] = {}
    for (family, candidate), loss in zip(everyone, kl, strict=True):
        if family not in winners or loss < winners[family][1]:
            winners[family] = candidate, float(loss)
    return winners


def _confirm(
    store: ClosedLoopStore,
    loaded: LoadedModel,
    shape: ModelShape,
    split: Split,
    data: TuningData,
    searches: Sequence[Search],
    winners: dict[str, tuple[Candidate, float]],
) -> TuningResult:
    """Measure winners, baseline and references on the held-out prompts, all in the same runs."""
    best_family = min(winners, key=lambda name: winners[name][1])
    others = _references(data, best_family, winners[best_family][0])
    labels = [*winners, f"fixed stride {1 / data.budget:g}", *others]
    baseline = FixedStride(1 / data.budget)
    policies: list[StepPolicy] = [*(winner.policy for winner, _ in winners.values()), baseline, *others.values()]
    runs = [
        store.run(loaded, file, policies) for file in tqdm(split.held_out, desc="confirming winners", unit="prompt")
    ]
    found = measured(labels, policies, TraceBatch(split.held_out), runs)
    by_label: dict[str, Measured] = dict(zip(labels, found, strict=True))
    results = [
        FamilyResult(
            family=search.family,
            parameters=winners[search.family][0].parameters,
            measured=by_label[search.family],
            tune_kl=winners[search.family][1],
            trials=search.trials,
        )
        for search in searches
    ]
    headers = [file.header for file in split.held_out]
    return TuningResult(
        model=shape,
        selection=Selection(**headers[0].selection),
        budget=data.budget,
        families=sorted(results, key=lambda result: result.tune_kl),
        baseline=by_label[labels[len(winners)]],
        references=[by_label[label] for label in others],
        prompt_kinds=[str(header.prompt["kind"]) for header in headers],
        prompt_names=[str(header.prompt["name"]) for header in headers],
        tune_names=[str(file.header.prompt["name"]) for file in split.tune],
        n_steps=headers[0].n_steps,
        context_tokens=float(np.mean([header.prompt["n_prompt_tokens"] for header in headers])),
        versions=versions() | {"optuna": optuna.__version__},
    )


def _references(data: TuningData, best_family: str, winner: Candidate) -> dict[str, StepPolicy]:
    """Fixed strides and the best family, with the same parameters, at half and at twice the budget."""
    policies: dict[str, StepPolicy] = {}
    for budget in (data.budget / 2, data.budget * 2):
        if budget > 1:
            continue
        policies[f"fixed stride {1 / budget:g}"] = FixedStride(1 / budget)
        # Below the longest stride there is nothing to allocate.
        if best_family != "fixed_stride" and budget >= 1 / STRIDES[-1]:
            at_budget = dataclasses.replace(data, budget=budget)
            policy = FAMILIES[best_family].suggest(FixedTrial(winner.parameters), at_budget)
            policies[f"{best_family} at {budget:g}"] = policy
    return policies


def _policy_file(result: TuningResult, split: Split, seed: int) -> PolicyFile:
    best = result.best
    ratio = kl_share(result, best.measured)
    return PolicyFile(
        policy=best.measured.policy,
        selection=result.selection,
        model=result.model,
        provenance={
            "family": best.family,
            "parameters": dict(best.parameters),
            "budget": result.budget,
            "seed": seed,
            "traces": [file.digest() for file in split.tune],
            "replay": {
                "full_share": best.measured.replay_full_share,
                "recovered_mass": best.measured.recovered_mass,
            },
            "closed_loop": {
                "prompts": list(result.prompt_names),
                "steps": result.n_steps,
                "full_share": best.measured.full_share,
                "kl": dataclasses.asdict(best.measured.kl),
                "kl_share_of_fixed_stride": ratio and dataclasses.asdict(ratio),
                "agreement": dataclasses.asdict(best.measured.agreement),
            },
            "versions": dict(result.versions),
        },
    )


if __name__ == "__main__":
    run_command(main)
