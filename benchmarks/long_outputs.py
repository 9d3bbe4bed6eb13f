"""`python benchmarks/long_outputs.py`: do policies hold over outputs as long as 512 or 1,024 steps?

Teacher-forced on prompts that no tuning saw, all policies of one selection as rows of the same run. Every run is kept
in the output folder as it comes, so an interrupted one goes on where it stopped. Writes `docs/long_outputs.md`, its
picture and `docs/results/long-outputs.json`. With other steps, context or k it writes a JSON file of its own, and a
section of the page. `--quick` is a rehearsal that writes to the output folder only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from exact_loop import exact_loop
from known_rows import measured_elsewhere
from long_outputs_report import draw, page, report
from machine import machine_name
from tqdm import tqdm
from tuned_rules import tuned_rules

from policies import (
    AlwaysFull,
    FixedStride,
    LearnedLogistic,
    PolicyFile,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from policies.stops import StopRule
from recycler.evaluate.baselines import streaming_llm_set
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.measure.ablation import measure_prompt_sensitivity
from recycler.measure.closed_loop import ClosedLoop, ClosedLoopStore
from recycler.model.loading import LoadedModel, load_model
from recycler.prompts import KINDS, Prompt, default_prompts
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
# Tuned on outputs of 64 and of 512 steps.
_POLICIES = f"{_DOCS}/results/policy-budget-0.1.json,{_DOCS}/results/policy-budget-0.1-512-steps.json"


@dataclass(frozen=True)
class Contender:
    """A policy with how its sets are chosen; with a rule, exact decoding that it drafts for."""

    name: str
    policy: StepPolicy
    selection: Selection
    stop: StopRule | None = None


def main(
    policies: Annotated[str, typer.Option(help="Policy files, separated by commas.")] = _POLICIES,
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/long_outputs"),
    steps: Annotated[int, typer.Option(help="Decode steps.", min=8)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind and seed.", min=1)] = 4,
    seeds: Annotated[str, typer.Option(help="Of the prompts, separated by commas.")] = "0",
    k: Annotated[int | None, typer.Option(help="Tokens of the sets; default: as in the policy files.")] = None,
    others: Annotated[bool, typer.Option(help="Whether methods of others decode as well.")] = True,
    only: Annotated[
        str, typer.Option(help="Contenders to decode, separated by semicolons; their rows join those of the JSON file.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal on one prompt.")] = False,
) -> dict[str, Any]:
    """Decode long outputs by every policy and by strides, and say how KL grows along them."""
    began = time.perf_counter()
    loaded = load_model(None)
    files = {path: PolicyFile.read(path) for path in policies.split(",")}
    own_k = next(iter(files.values())).selection.k
    if k is not None:
        files = {path: file.at_k(k) for path, file in files.items()}
    contenders = [*_contenders(files), _exact(files), *(_others(loaded, out, k or own_k) if others else ())]
    wanted = [name.strip() for name in only.split(";") if name.strip()]
    if unknown := set(wanted) - {contender.name for contender in contenders}:
        raise ValueError(f"there is no contender {min(unknown)!r}: there are {[one.name for one in contenders]}.")
    contenders = [contender for contender in contenders if not wanted or contender.name in wanted]
    prompts = [
        prompt
        for seed in map(int, seeds.split(","))
        for prompt in default_prompts(
            loaded.tokenizer,
            n_per_kind=1 if quick else per_kind,
            context_tokens=context_tokens,
            n_steps=steps,
            seed=seed,
            kinds=["copying"] if quick else None,
            # After those that are tuned and confirmed on by default.
            first_index=4,
        )
    ]
    found = _run(ClosedLoopStore(out), loaded, prompts, contenders)
    names = [contender.name for contender in contenders]
    result: dict[str, Any] = {
        "model": loaded.id,
        "machine": machine_name(),
        "steps": steps,
        "context_tokens": context_tokens,
        "k": k or own_k,
        "prompts": len(prompts),
        "kinds": [kind for kind in KINDS if any(prompt.kind == kind for prompt in prompts)],
        "rows": {name: _row(found[name], [prompt.kind for prompt in prompts]) for name in names},
    }
    figure = draw(result)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "long-outputs.png", dpi=110)
    if quick:
        document = report([result])
    else:
        usual = (steps, context_tokens, k or own_k) == (512, 1536, own_k)
        name = "long-outputs" if usual else f"long-outputs-{context_tokens}-{steps}-k{k or own_k}"
        if wanted:
            result = _joined(json.loads((_DOCS / "results" / f"{name}.json").read_text(encoding="utf-8")), result)
            figure = draw(result)
        if usual:
            figure.savefig(_DOCS / "pictures" / "long-outputs.png", dpi=110)
        write_text(_DOCS / "results" / f"{name}.json", json.dumps(result))
        document = page(_DOCS / "results")
        write_text(_DOCS / "long_outputs.md", document)
    write_text(out / "long_outputs.md", document)
    print(document)
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _joined(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured before, and those that were measured now on the same prompts."""
    elsewhere = measured_elsewhere(known, found, "rows")
    return {**known, "rows": {**known["rows"], **{name: row | elsewhere for name, row in found["rows"].items()}}}


def _contenders(files: Mapping[str, PolicyFile]) -> list[Contender]:
    """Policies that were tuned, and stride 10 with every set that one of them has, pooled and not."""
    names = {path: f"tuned on {file.horizon_steps} steps" for path, file in files.items()}
    tuned = [Contender(names[path], file.policy, file.selection) for path, file in files.items()]
    sets: dict[Selection, str] = {}
    for file in files.values():
        sets.setdefault(file.selection.pooled(), f"stride 10, pooled {file.selection.ranking} sets")
        sets.setdefault(file.selection, f"stride 10, unpooled {file.selection.ranking} sets")
    strides = [Contender(name, FixedStride(10), selection) for selection, name in sets.items()]
    return [Contender("full attention", AlwaysFull(), tuned[0].selection), *tuned, *strides]


def _exact(files: Mapping[str, PolicyFile]) -> Contender:
    """What was tuned on the longest outputs drafts, until the rule that was learned for a CPU verifies."""
    drafts = max(files.values(), key=lambda file: file.horizon_steps or 0)
    stop = tuned_rules(_DOCS / "results/exact-tuned.json")[0].rule
    return Contender(f"exact, drafts tuned on {drafts.horizon_steps} steps", drafts.policy, drafts.selection, stop)


def _others(loaded: LoadedModel, out: Path, k: int) -> list[Contender]:
    """Methods of others near a tenth of unit-steps, with settings of ours where a source gives none.

    - SFI (arXiv 2603.12038): full where a sentence ends, with its authors' least gap of 16 steps and 32 at most; and as
      often as a tenth allows, gaps of 8 to 12 steps being ours.
    - DuoAttention (arXiv 2410.10819), in kind: a tenth of the KV heads are always full, those that alone do most damage
      when they see sinks and window only, and the others see those only. It trains gates where this ablates.
    - FreeKV (arXiv 2505.13109), in kind: a KV head looks when the cosine of its query with that of the step before is
      below a threshold, one for all. The authors have one for each model, and choose pages for every next step off the
      critical path, which counts as nothing there and would be reading here; ours is the threshold that gives a tenth.
    """
    paper = Selection(k, prompt_queries=1)
    ends = sentence_end_tokens(loaded.tokenizer)
    streaming = streaming_llm_set(k)
    prompts = default_prompts(loaded.tokenizer, n_per_kind=1, context_tokens=1536, n_steps=24)
    damage = measure_prompt_sensitivity(loaded, out / "streaming", prompts, streaming)
    table = np.sum([np.sqrt(np.maximum(kl, 0)) for kl in damage.kl.values()], axis=0)
    least = np.sort(table, axis=None)[-round(table.size / 10)]
    duo = FixedStride(np.where(table >= least, 1, 1e9).tolist())
    freekv = _at_a_tenth(loaded, ClosedLoopStore(out), paper)
    return [
        Contender("SFI, gap 16 to 32", SentenceBoundary(ends, 32, 16), paper),
        Contender("SFI, gap 8 to 12", SentenceBoundary(ends, 12, 8), paper),
        Contender("DuoAttention-like", duo, streaming),
        Contender("FreeKV-like", freekv, paper),
    ]


def _at_a_tenth(loaded: LoadedModel, store: ClosedLoopStore, selection: Selection) -> LearnedLogistic:
    """Looks where a query turns from the one before by more than what gives a tenth of full steps on tuning prompts."""

    def looking_beyond(drift: float) -> LearnedLogistic:
        return LearnedLogistic(("step_drift",), (1.0,), -drift)

    prompts = default_prompts(loaded.tokenizer, n_per_kind=1, context_tokens=1536, n_steps=128)
    drifts = np.geomspace(0.02, 1.0, 15)
    loops = store.run_all(
        loaded,
        prompts,
        [looking_beyond(float(drift)) for drift in drifts],
        selection,
        desc="calibrating FreeKV-like",
    )
    share = np.mean([loop.full_share for loop in loops], axis=0)
    # Falls as the drift that is tolerated grows.
    return looking_beyond(float(np.exp(np.interp(-0.1, -share, np.log(drifts)))))


def _run(
    store: ClosedLoopStore, loaded: LoadedModel, prompts: Sequence[Prompt], contenders: Sequence[Contender]
) -> dict[str, list[ClosedLoop]]:
    """By contender what it did on each prompt: closed loops without the axis of policies."""
    found: dict[str, list[ClosedLoop]] = {}
    approximate = [contender for contender in contenders if contender.stop is None]
    for one in contenders:
        if one.stop is not None:
            how = (one.policy, one.selection, one.stop)
            found[one.name] = [exact_loop(store.folder, loaded, prompt, *how) for prompt in tqdm(prompts, one.name)]
    for selection in dict.fromkeys(contender.selection for contender in approximate):
        mine = [contender for contender in approximate if contender.selection == selection]
        policies, desc = [contender.policy for contender in mine], ", ".join(contender.name for contender in mine)
        loops = store.run_all(loaded, prompts, policies, selection, desc=desc)
        for row, contender in enumerate(mine):
            arrays = [{field.name: getattr(loop, field.name)[row] for field in fields(loop)} for loop in loops]
            found[contender.name] = [ClosedLoop(**one) for one in arrays]
    return found


def _row(loops: Sequence[ClosedLoop], kinds: Sequence[str]) -> dict[str, Any]:
    """What is said of a contender over all prompts and by kind."""
    kl = np.stack([loop.kl for loop in loops])
    accuracy = np.array([loop.accuracy[:-1].mean() for loop in loops])
    by_kind = {kind: np.array(kinds) == kind for kind in dict.fromkeys(kinds)}

    def quarters(values: np.ndarray) -> list[float]:
        return [float(part.mean()) for part in np.array_split(values, 4, axis=1)]

    return {
        "kl": float(kl.mean()),
        "quarters": quarters(kl),
        "p95": float(np.quantile(kl, 0.95)),
        "above_1_nat": float((kl > 1).mean()),
        "agreement": float(np.mean([loop.agreement.mean() for loop in loops])),
        "full_share": float(np.mean([loop.full.mean() for loop in loops])),
        "read_share": float(np.mean([loop.read_share.mean() for loop in loops])),
        "kinds": {
            kind: {
                "kl": float(kl[mine].mean()),
                "quarters": quarters(kl[mine]),
                "accuracy": float(accuracy[mine].mean()),
                "by_step": kl[mine].mean(0).round(5).tolist(),
            }
            for kind, mine in by_kind.items()
        },
        "prompt_kl": kl.mean(1).tolist(),
    }


if __name__ == "__main__":
    run_command(main)
