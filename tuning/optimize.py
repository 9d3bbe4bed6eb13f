"""`python -m tuning.optimize --budget 0.1`: from nothing but a budget to a policy that was confirmed in closed loop.

`--max-kl 0.1` asks the other way round: for the cheapest policy that is certified to keep a limit of KL.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import optuna
import typer
from rich.console import Console

from policies import FixedStride, ModelShape, Selection, StepPolicy, written_by
from recycler.measure.ablation import measure_prompt_sensitivity, measure_sensitivity
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.measure.store import digest_of_tokens
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import check_positions, model_shape
from recycler.model.versions import versions
from recycler.model.weights_digest import weights_sample
from recycler.prompts import KINDS, Prompt, default_prompts
from recycler.record.folder import record_prompts
from recycler.record.one_prompt import traced_prompt
from recycler.record.size_losses import measure_size_losses
from traces import TraceFile, TraceFolder
from traces.reporting.command import run_command
from traces.reporting.differences import differences
from traces.reporting.folder_lock import folder_locked
from traces.reporting.whole_file import errors_named
from traces.trace_file import SUFFIX
from tuning.certify.certificate import KlLimit, check_n_prompts
from tuning.certify.ladder import ladder_budgets
from tuning.confirm.comparison import Compared, compare_ladder, compare_winners
from tuning.confirm.measured import measured
from tuning.confirm.results import Measured, TuningResult
from tuning.confirm.winners import choose_winners
from tuning.divide.set_sizes import size_sets
from tuning.divide.tuning_data import TuningData, check_budget, unit_cost
from tuning.exact import round_costs_of, tuned_exactly
from tuning.families import FAMILIES, families_named
from tuning.replay.trace_batch import TraceBatch
from tuning.report.files import write_report, write_results
from tuning.report.policy_export import policy_file
from tuning.report.result_rows import kl_share
from tuning.report.table import print_table
from tuning.search.split import Split, split_by_prompt
from tuning.search.study import search_family
from tuning.search.study_file import study_storage

# Share of unit-steps that families are searched at, unless another is given.
_BUDGET = 0.1


def main(
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of unit-steps that may run full, in (0, 1]; default: 0.1. With --max-kl the most that may be "
            "chosen; default: 1."
        ),
    ] = None,
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
        str | None,
        typer.Option(help="Optuna storage URL, or journal:///path, of a shared study; default: a file in --out."),
    ] = None,
    k: Annotated[
        str, typer.Option(help="Tokens of the recycled set, where traces are recorded; 5% is a share of the context.")
    ] = "128",
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens, where traces are recorded.")] = 1536,
    steps: Annotated[
        int, typer.Option(help="Decode steps that the policy is to hold for, where traces are recorded.", min=2)
    ] = 512,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind, where traces are recorded.", min=2)] = 4,
    first_index: Annotated[
        int,
        typer.Option(
            help="Of the first prompt of each kind: natural texts go by index, and are alike at all seeds.", min=0
        ),
    ] = 0,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Export the cheapest policy whose expected KL to full attention is certified to be at most this, nats "
            "per step; refuse if there is none."
        ),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the certificate of --max-kl, in [0.75, 1); default: 0.9.")
    ] = None,
    kl_cap: Annotated[
        float | None, typer.Option(help="Nats up to which a prompt counts in the certificate; default: 4 x --max-kl.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Then choose when exact decoding stops drafting too: exact.json, as python -m tuning.exact."
        ),
    ] = False,
    costs: Annotated[
        str | None,
        typer.Option(help="With --exact: as in python -m tuning.exact; default: measured."),
    ] = None,
) -> dict[str, Any]:
    """Record, tune every family at the budget, confirm the winners in closed loop, export the best policy."""
    stages = Stages()
    asked = _asked(max_kl, confidence, kl_cap)
    if costs is not None and not exact:
        raise ValueError(f"--costs {costs} are of exact decoding, and there is no --exact.")
    of_rounds = round_costs_of(costs)
    most = budget if budget is not None else _BUDGET if asked is None else 1.0
    check_budget(most)
    # Searching at one budget whatever the limit, and at the usual one, shares its trials with other runs.
    search_budget = most if asked is None else min(most, _BUDGET)
    chosen_families = families_named([name.strip() for name in families.split(",") if name.strip()])
    selection = Selection.unpooled(_n_tokens(k, context_tokens))
    if asked is not None and traces is None:
        # Before minutes of recording.
        check_n_prompts(asked, len(KINDS) * (per_kind // 2), len(KINDS))
    files = list(TraceFolder(traces)) if traces is not None else []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    loaded = _load(model, files, dtype, device)
    shape = model_shape(loaded.model, loaded.id)
    trace_folder = traces or out / "traces"
    if traces is None:
        check_positions(loaded.model, context_tokens, steps)
        prompts = default_prompts(
            loaded.tokenizer,
            n_per_kind=per_kind,
            context_tokens=context_tokens,
            n_steps=steps,
            seed=seed,
            first_index=first_index,
        )
    else:
        prompts = [traced_prompt(file) for file in files]
    split = split_by_prompt(prompts)
    n_kinds = len({prompt.kind for prompt in prompts})
    if asked is not None:
        check_n_prompts(asked, len(split.held_out), n_kinds)
    _make(out)
    with folder_locked(out):
        if traces is None:
            recorded = _record(loaded, split, selection, out / "set_sizes", trace_folder, stages)
        else:
            stages.begin("sensitivity")
            recorded = _as_recorded(loaded, split_by_prompt(files), trace_folder)
        selection, tune = recorded.selection, TraceBatch(recorded.tuned_on)
        stages.begin("search")
        data = TuningData(tune, search_budget, recorded.unit_cost)

        with errors_named(out / "study.log"):
            trial_store = storage or study_storage(out / "study.log")
        identity = _identity(recorded.tuned_on, search_budget, data.unit_cost)
        with errors_named(out / "study.log"):
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
        stages.begin("choosing winners")
        store = ClosedLoopStore(out / "closed_loop")
        everyone = [candidate.policy for search in searches for candidate in search.candidates]
        winners = choose_winners(
            searches, store.run_all(loaded, split.validate, everyone, selection, desc="choosing winners")
        )

        def measure(policies: Mapping[str, StepPolicy]) -> dict[str, Measured]:
            return _measured(store, loaded, split.held_out, tune, selection, policies)

        stages.begin("confirming winners")
        if asked is None:
            compared = compare_winners(measure, data, winners)
        else:
            compared = compare_ladder(measure, data, winners, asked, ladder_budgets(most), n_kinds)
        result = _result(shape, selection, split, compared)

        stages.begin("report")
        policy_path = out / "policy.json"
        exported = policy_file(result, recorded.tuned_on, seed, weights_sample(loaded.model))
        exported.write(policy_path)
        write_results(result, out)
        report = write_report(result, out)
        print_table(result, Console())
        tuned_exact = {}
        if exact:
            stages.begin("exact")
            tuned_exact = {"exact": tuned_exactly(loaded, exported, split, out / "exact.json", costs=of_rounds)}
        seconds = stages.end()
        print(", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()))
        best = result.best.measured
        ratio = kl_share(result, best)
        return {
            "policy": str(policy_path),
            "family": result.best.family,
            "budget": result.budget,
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
            "seconds": round(sum(seconds.values()), 1),
            "stages_s": seconds,
            **({} if result.certificate is None else {"certificate": result.certificate.to_json()}),
            **tuned_exact,
        }


class _Recorded(NamedTuple):
    """What the search begins from.

    Attributes:
        tuned_on: Traces of the tuning prompts.
        selection: How their sets are chosen.
        unit_cost: float64 `(layers, kv_heads)`, mean 1.
    """

    tuned_on: Sequence[TraceFile]
    selection: Selection
    unit_cost: np.ndarray


def _record(
    loaded: LoadedModel, split: Split[Prompt], selection: Selection, measured_in: Path, traces: Path, stages: Stages
) -> _Recorded:
    """Measure what sizes are chosen by, choose them, and record the tuning prompts."""
    _refuse_other_sets(traces, selection)
    # By identity: names of prompts are the same with every seed.
    measured_in = measured_in / _identity_of_sizes(loaded, split.tune, selection)
    stages.begin("sensitivity")
    sensitivity = measure_prompt_sensitivity(loaded, measured_in, split.ablate, selection)
    stages.begin("set sizes")
    sized = size_sets(selection, measure_size_losses(loaded, split.tune, selection, measured_in), sensitivity)
    stages.begin("recording")
    n_steps = split.tune[0].n_steps
    tuned_on = record_prompts(loaded, split.tune, sized.selection, traces, max_age=n_steps)
    return _Recorded(tuned_on, sized.selection, sized.unit_cost)


def _as_recorded(loaded: LoadedModel, split: Split[TraceFile], traces: Path) -> _Recorded:
    """The same of traces that are there, with their sets."""
    cost = unit_cost(TraceBatch(split.tune), measure_sensitivity(loaded, traces, split.ablate))
    return _Recorded(split.tune, Selection(**split.tune[0].header.selection), cost)


class Stages:
    """How long each part of a run took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name, self._began = "loading", time.perf_counter()

    def begin(self, name: str) -> None:
        """End the stage before, and begin one."""
        now = time.perf_counter()
        self._seconds[self._name] = round(now - self._began, 1)
        self._name, self._began = name, now

    def end(self) -> dict[str, float]:
        """End the last stage; seconds by stage."""
        self.begin("")
        return self._seconds


def _asked(max_kl: float | None, confidence: float | None, kl_cap: float | None) -> KlLimit | None:
    if max_kl is not None:
        return KlLimit.of(max_kl, cap=kl_cap, confidence=0.9 if confidence is None else confidence)
    for option, value in (("--confidence", confidence), ("--kl-cap", kl_cap)):
        if value is not None:
            raise ValueError(f"{option} {value:g} is of a certificate, but there is no --max-kl to certify.")
    return None


def _n_tokens(k: str, context_tokens: int) -> int:
    """Tokens that `--k` asks for: a number of them, or a share of the context."""
    number = k.strip().removesuffix("%")
    try:
        n_tokens = int(number) if number == k.strip() else round(float(number) / 100 * context_tokens)
    except (ValueError, OverflowError):
        raise ValueError(f"k is a number of tokens, as 128, or a share of the context, as 5%, not {k!r}.") from None
    return n_tokens


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


def _identity(tuned_on: Sequence[TraceFile], budget: float, cost: np.ndarray) -> str:
    """Short digest of all that a study's trials depend on."""
    parts = [file.digest() for file in tuned_on] + [repr(budget), hashlib.sha256(cost.tobytes()).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _refuse_other_sets(traces: Path, selection: Selection) -> None:
    """Before minutes of measuring: but for the sizes of units, traces that are there must be of this selection."""
    held = TraceFolder(traces)[0].header.selection if any(traces.glob("*" + SUFFIX)) else selection.to_json()
    if found := differences({**held, "unit_k": None}, selection.to_json()):
        raise ValueError(f"{traces} was recorded with {found}: record into another folder, or remove the traces.")


def _identity_of_sizes(loaded: LoadedModel, prompts: Sequence[Prompt], selection: Selection) -> str:
    """Short digest of all that sizes of sets are chosen by."""
    texts = [[prompt.name, prompt.n_prompt_tokens, digest_of_tokens(prompt.tokens)] for prompt in prompts]
    parts = [loaded.id, str(loaded.model.dtype), loaded.weights_digest, versions(), selection.to_json(), texts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write results to {folder}: {error.strerror}.") from error


def _measured(
    store: ClosedLoopStore,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    tune: TraceBatch,
    selection: Selection,
    policies: Mapping[str, StepPolicy],
) -> dict[str, Measured]:
    """Policies in closed loop; clocks for all units with pooled sets too, of which the better ones count."""
    pooled = selection.pooled()
    clocks = {label: policy for label, policy in policies.items() if isinstance(policy, FixedStride)}
    if pooled == selection:
        clocks = {}
    rows, clock_rows = list(policies.values()), list(clocks.values())
    runs = store.run_all(loaded, prompts, rows, selection, desc="confirming winners")
    clock_runs = store.run_all(loaded, prompts, clock_rows, pooled, desc="confirming clocks") if clocks else []
    found = dict(zip(policies, measured(list(policies), rows, tune, runs), strict=True))
    labels = [f"{label}, pooled" for label in clocks]
    others = measured(labels, clock_rows, tune, clock_runs, traced_set=False)
    for label, other in zip(clocks, others, strict=True):
        if other.kl.value <= found[label].kl.value:
            found[label] = other
    return found


def _result(shape: ModelShape, selection: Selection, split: Split[Prompt], compared: Compared) -> TuningResult:
    held_out = split.held_out
    return TuningResult(
        model=shape,
        selection=selection,
        budget=compared.budget,
        families=compared.families,
        baseline=compared.baseline,
        references=compared.references,
        prompt_kinds=[prompt.kind for prompt in held_out],
        prompt_names=[prompt.name for prompt in held_out],
        tune_names=[prompt.name for prompt in split.tune],
        n_steps=held_out[0].n_steps,
        context_tokens=float(np.mean([prompt.n_prompt_tokens for prompt in held_out])),
        versions=versions() | {"optuna": optuna.__version__},
        ladder=compared.ladder,
    )


if __name__ == "__main__":
    run_command(main, version=written_by())
