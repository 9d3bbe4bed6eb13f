"""`python benchmarks/schedulers.py`: how much of what a schedule can give do the tuned ones give?

At every budget the families are tuned on some prompts and the best of each is chosen on others; then all of them,
clocks with three sets, a schedule that knows the future, and a new set at every step decode the held-out prompts.
Everything is kept in the output folder as it comes, so an interrupted run goes on where it stopped. `--quick` is a
rehearsal in a few minutes; its numbers mean little, and it writes to the output folder only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import optuna
import typer
from foreseen import Foreseen
from machine import machine_name
from schedulers_picture import draw_schedulers
from schedulers_report import BUDGETS, MAIN_BUDGET, Setting, kept, report, rows, targets
from tqdm import tqdm
from transformers import PreTrainedModel

from policies import FixedStride, Selection, StepPolicy
from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows, decode_rows
from recycler.evaluate.answers import measure_once
from recycler.evaluate.baselines import fresh_top_k, refreshkv_set
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.outcome import PromptOutcome
from recycler.measure.ablation import measure_prompt_sensitivity
from recycler.measure.closed_loop import ClosedLoop, ClosedLoopStore
from recycler.measure.store import Store
from recycler.model.loading import LoadedModel, load_model
from recycler.prompts import Prompt, default_prompts
from recycler.record.folder import record_prompts
from recycler.record.size_losses import measure_size_losses
from recycler.tasks import TaskPrompt
from traces import TraceFile
from traces.reporting.command import run_command
from tuning.confirm.winners import Winner, choose_winners
from tuning.divide.hindsight import hindsight
from tuning.divide.set_sizes import SizedSets, size_sets
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.replay.trace_batch import TraceBatch
from tuning.search.split import Split, split_by_prompt
from tuning.search.study import search_family

_ROOT = Path(__file__).parents[1]
_SETTINGS = {
    "3000": Setting(3000, 128, 64, 4, 30),
    "8000": Setting(8000, 256, 64, 1, 30, tuned_at="3000", first_index=1),
    "quick": Setting(384, 48, 16, 2, 3),
}


@dataclass(frozen=True)
class ForeseenMethod(Method):
    """A schedule that is another one for every prompt, and so has no place in a policy file.

    Attributes:
        policy: When units run full.
        selection: How sets are chosen.
    """

    policy: Foreseen
    selection: Selection

    @property
    def prompt_queries(self) -> int | None:
        return self.selection.prompt_queries

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.array(self.policy.full).tobytes()).hexdigest()
        return {"foreseen": digest, "selection": dataclasses.asdict(self.selection)}

    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        return decode_rows(model, prompt, [self.policy], self.selection, fast=fast)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/schedulers"),
    sizes: Annotated[str, typer.Option(help="Some of 3000 and 8000 tokens, separated by commas.")] = "3000,8000",
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal in a few minutes.")] = False,
) -> dict[str, Any]:
    """Tune at every budget, decode the held-out prompts by everything, and say which targets are met."""
    began = time.perf_counter()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = [_SETTINGS[name.strip()] for name in (["quick"] if quick else sizes.split(","))]
    loaded = load_model(None)
    parameters: dict[str, Any] = {}
    found: dict[str, list[PromptOutcome]] = {}
    for setting in chosen:
        found[setting.name], parameters[setting.name] = _measure(loaded, setting, out)
    everything: dict[str, Any] = {
        "model": loaded.id,
        "machine": machine_name(),
        "settings": {setting.name: dataclasses.asdict(setting) for setting in chosen},
        "tuned": parameters,
        "rows": {name: rows(outcomes) for name, outcomes in found.items()},
        "targets": {name: targets(outcomes) for name, outcomes in found.items()},
        "outcomes": {name: [kept(outcome) for outcome in outcomes] for name, outcomes in found.items()},
    }
    for setting in chosen:
        caption = (
            f"{loaded.id}, k = {setting.k} tokens, {setting.context_tokens:,} tokens of context, "
            f"{len(found[setting.name])} held-out prompts x {setting.steps} steps"
        )
        figure = draw_schedulers(everything["rows"][setting.name], caption)
        figure.savefig(out / setting.name / "schedulers.png", dpi=110)
        if not quick:
            figure.savefig(_ROOT / "docs" / "pictures" / f"schedulers-{setting.name}.png", dpi=110)
    document = report(chosen, everything)
    (out / "schedulers.md").write_text(document, encoding="utf-8")
    if not quick:
        machine = re.sub("[^0-9A-Za-z]+", "-", machine_name()).strip("-")
        path = _ROOT / "benchmarks" / "results" / f"schedulers-{machine}.json"
        path.write_text(json.dumps(everything), encoding="utf-8")
        (_ROOT / "docs" / "schedulers.md").write_text(document, encoding="utf-8")
    print(document)
    return {"targets": everything["targets"], "minutes": round((time.perf_counter() - began) / 60, 1)}


class _Tuned(NamedTuple):
    """What one setting has to show.

    Attributes:
        sized: Sets and costs.
        winners: By name of the method.
        prompts: Held out.
        files: Their traces.
    """

    sized: SizedSets
    winners: dict[str, Winner]
    prompts: list[Prompt]
    files: tuple[TraceFile, ...]


def _prompts(loaded: LoadedModel, setting: Setting) -> list[Prompt]:
    return default_prompts(
        loaded.tokenizer,
        n_per_kind=setting.per_kind,
        context_tokens=setting.context_tokens,
        n_steps=setting.steps,
        first_index=setting.first_index,
    )


def _tuned(loaded: LoadedModel, setting: Setting, folder: Path) -> _Tuned:
    prompts = _prompts(loaded, setting)
    split = split_by_prompt(prompts)
    selection, measured_in = Selection.unpooled(setting.k), folder / "set_sizes"
    sensitivity = measure_prompt_sensitivity(loaded, measured_in, split.ablate, selection)
    sized = size_sets(selection, measure_size_losses(loaded, split.tune, selection, measured_in), sensitivity)
    files = record_prompts(loaded, prompts, sized.selection, folder / "traces", max_age=setting.steps)
    of_files = split_by_prompt(files)
    data = TuningData(TraceBatch(of_files.tune), MAIN_BUDGET, sized.unit_cost)
    return _Tuned(sized, _tune(loaded, setting, of_files, data, folder), list(split.held_out), of_files.held_out)


def _measure(loaded: LoadedModel, setting: Setting, out: Path) -> tuple[list[PromptOutcome], dict[str, Any]]:
    """Outcomes of the held-out prompts, and what the search chose for every tuned policy."""
    source = setting if setting.tuned_at is None else _SETTINGS[setting.tuned_at]
    tuned = _tuned(loaded, source, out / source.name)
    parameters = {
        name: {"family": one.search.family, **one.candidate.parameters} for name, one in tuned.winners.items()
    }
    policies = {name: winner.candidate.policy for name, winner in tuned.winners.items()}
    store = Store(out / setting.name / "outcomes")
    if setting is not source:
        methods = _methods(tuned.sized.selection.at_k(setting.k), policies)
        bar = tqdm(_prompts(loaded, setting), desc=f"comparing, {setting.name}", unit="prompt")
        return [measure_once(store, loaded, _teacher_forced(prompt), methods) for prompt in bar], parameters
    selection = tuned.sized.selection
    foreseen = hindsight(TraceBatch(tuned.files), tuned.sized.unit_cost, MAIN_BUDGET)
    outcomes = []
    bar = tqdm(tuned.prompts, desc=f"comparing, {setting.name}", unit="prompt")
    for place, prompt in enumerate(bar):
        oracle = Foreseen.of(foreseen[:, place])
        methods = [*_methods(selection, policies), ForeseenMethod("hindsight 0.1", "future", oracle, selection)]
        outcomes.append(measure_once(store, loaded, _teacher_forced(prompt), methods))
    return outcomes, parameters


def _tune(
    loaded: LoadedModel, setting: Setting, split: Split[TraceFile], data: TuningData, folder: Path
) -> dict[str, Winner]:
    """The best candidate of every family at the main budget, and of all families at the others, by closed loop."""
    folder.mkdir(parents=True, exist_ok=True)
    searches = {
        budget: [
            search_family(
                family,
                dataclasses.replace(data, budget=budget),
                n_trials=setting.trials,
                n_candidates=1,
                seed=0,
                storage=None,
                study_name=f"{family.name}-{budget:g}",
            )
            for family in FAMILIES.values()
        ]
        for budget in BUDGETS
    }
    everyone = [candidate.policy for some in searches.values() for search in some for candidate in search.candidates]
    store = ClosedLoopStore(folder / "closed_loop")
    runs = [store.run(loaded, file, everyone) for file in tqdm(split.validate, desc="choosing winners", unit="prompt")]
    tuned: dict[str, Winner] = {}
    first = 0
    for budget, some in searches.items():
        n = sum(len(search.candidates) for search in some)
        winners = choose_winners(some, [_rows_of(run, slice(first, first + n)) for run in runs])
        first += n
        tuned[f"tuned {budget:g}"] = min(winners, key=lambda winner: winner.tune_kl)
        if budget == MAIN_BUDGET:
            tuned |= {f"{winner.search.family} {budget:g}": winner for winner in winners}
    return tuned


def _rows_of(run: ClosedLoop, rows: slice) -> ClosedLoop:
    return ClosedLoop(*(getattr(run, field.name)[rows] for field in dataclasses.fields(run)))


def _methods(selection: Selection, tuned: Mapping[str, StepPolicy]) -> list[Method]:
    """Tuned policies, clocks with three sets at every budget, and new sets at every step."""
    k = selection.k
    sets = {", same set": selection, "": Selection(k), ", RefreshKV's set": refreshkv_set(k)}
    methods: list[Method] = [Scheduled(name, "tuned", policy, selection) for name, policy in tuned.items()]
    for budget, (suffix, some) in itertools.product(BUDGETS, sets.items()):
        source = "RefreshKV fixed stride, arXiv 2411.05787"
        methods.append(Scheduled(f"stride {1 / budget:g}{suffix}", source, FixedStride(1 / budget), some))
    # Sizes are for a schedule: units that always run full have the least.
    fresh = {"": Selection(k), ", unpooled": dataclasses.replace(selection, unit_k=None)}
    for suffix, some in fresh.items():
        methods.append(fresh_top_k(f"new set at every step{suffix}", "ceiling", some))
    return methods


def _teacher_forced(prompt: Prompt) -> TaskPrompt:
    return TaskPrompt(prompt, 0, lambda _: 0.0)


if __name__ == "__main__":
    run_command(main)
