"""What is compared: the policies under test, and the methods to beat at their k and budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from policies import ModelShape, PolicyFile, Selection
from recycler.evaluate.baselines import baselines, dynamic_schedules
from recycler.evaluate.calibrate import calibrated_thresholds
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.model.loading import LoadedModel
from recycler.model.versions import versions
from recycler.prompts import default_prompts
from traces.reporting.whole_file import write_text

_DEFAULT_BUDGET = 0.1


def under_test(paths: Sequence[Path], files: Sequence[PolicyFile]) -> list[Scheduled]:
    """The policies of the files, under their family's name where that tells them apart, else the file's."""
    k = files[0].selection.k
    for path, file in zip(paths, files, strict=True):
        if file.selection.k != k:
            raise ValueError(f"methods are compared at equal k, but {path} has {file.selection.k} and {paths[0]} {k}.")
    families = [str(file.provenance.get("family", file.policy.kind)) for file in files]
    names = families if len(set(families)) == len(files) else [path.stem for path in paths]
    return [
        Scheduled(f"tuned_{name}", f"policy file {path}", file.policy, file.selection)
        for name, path, file in zip(names, paths, files, strict=True)
    ]


def competitors(
    loaded: LoadedModel,
    shape: ModelShape,
    file: PolicyFile,
    wanted: Sequence[str],
    out: Path,
    context_tokens: int,
    steps: int,
    seed: int,
) -> list[Method]:
    """The baselines asked for, at the k and the budget of the policy."""
    if list(wanted) == ["none"]:
        return []
    selection, k = file.selection, file.selection.k
    budget = float(file.provenance.get("budget", _DEFAULT_BUDGET))
    ends = sentence_end_tokens(loaded.tokenizer)
    methods = baselines(k, shape, budget, ends, our_set=selection, seed=seed)
    dynamic = dynamic_schedules(selection)
    known = [*(method.name for method in methods), *(schedule.name for schedule in dynamic)]
    for name in wanted:
        if name not in known:
            raise ValueError(f"the method {name!r} is unknown: use some of {', '.join(known)}, or none.")
    chosen = set(wanted or known)
    asked = [schedule for schedule in dynamic if schedule.name in chosen]
    if asked:
        thresholds = _thresholds(loaded, selection, budget, out, context_tokens, steps, seed)
        methods += [schedule.method(thresholds[schedule.name], k, selection) for schedule in asked]
    return [method for method in methods if method.name in chosen]


def _thresholds(
    loaded: LoadedModel, selection: Selection, budget: float, out: Path, context_tokens: int, steps: int, seed: int
) -> dict[str, float]:
    """Thresholds by name of the schedule, tuned on the first prompt of each kind, or read where that was done."""
    settings = {
        "model": loaded.id,
        "dtype": str(loaded.model.dtype),
        "selection": selection.to_json(),
        "budget": budget,
        "context_tokens": context_tokens,
        "steps": steps,
        "seed": seed,
        "versions": versions(),
    }
    path = out / "thresholds.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.get("settings") == settings:
            return {name: float(value) for name, value in known["thresholds"].items()}
    prompts = default_prompts(loaded.tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=steps, seed=seed)
    tuned = calibrated_thresholds(loaded, prompts, selection.k, budget, selection.pooled())
    found = {schedule.name: threshold for schedule, threshold in tuned.items()}
    write_text(path, json.dumps({"settings": settings, "thresholds": found}))
    return found
