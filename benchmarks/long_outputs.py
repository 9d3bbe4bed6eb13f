"""`python benchmarks/long_outputs.py`: do policies hold over outputs as long as 512 or 1,024 steps?

Teacher-forced on prompts that no tuning saw, all policies of one selection as rows of the same run. Every run is kept
in the output folder as it comes, so an interrupted one goes on where it stopped. Writes `docs/long_outputs.md`, its
picture and `docs/results/long-outputs.json`. With another model, other steps, context, k or prompts it writes a JSON
file of its own, and a section of the page. `--quick` is a rehearsal that writes to the output folder only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from exact_loop import exact_loop
from known_rows import measured_elsewhere
from long_outputs_contenders import FULL, Contender, ExactDrafts, exact_drafts, methods_of_others, policies_and_strides
from long_outputs_report import draw, page, report
from machine import machine_name
from method_loop import method_loops
from tqdm import tqdm

from policies import PolicyFile, Selection, StepPolicy
from recycler.evaluate.method import Scheduled
from recycler.measure.closed_loop import ClosedLoop, ClosedLoopStore
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import model_shape
from recycler.prompts import KINDS, Prompt, default_prompts
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
# Tuned on outputs of 64 and of 512 steps.
_POLICIES = f"{_DOCS}/results/policy-budget-0.1.json,{_DOCS}/results/policy-budget-0.1-512-steps.json"


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    policies: Annotated[str, typer.Option(help="Policy files, separated by commas.")] = _POLICIES,
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/long_outputs"),
    steps: Annotated[int, typer.Option(help="Decode steps.", min=8)] = 512,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind and seed.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of what is drawn in the prompts.")] = 0,
    first_index: Annotated[
        int, typer.Option(help="Of the first prompt of each kind; default: after those of python -m tuning.optimize.")
    ] = 4,
    k: Annotated[int | None, typer.Option(help="Tokens of the sets; default: as in the policy files.")] = None,
    others: Annotated[bool, typer.Option(help="Whether exact decoding and methods of others run as well.")] = True,
    only: Annotated[
        str,
        typer.Option(
            help="Contenders to decode, separated by semicolons; their rows join those of a JSON file that is there."
        ),
    ] = "",
    kinds: Annotated[
        str, typer.Option(help="Kinds of text, separated by commas: not all fill every context.")
    ] = ",".join(KINDS),
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal on one prompt.")] = False,
) -> dict[str, Any]:
    """Decode long outputs by every policy and by strides, and say how KL grows along them."""
    began = time.perf_counter()
    loaded = load_model(model)
    files = {path: PolicyFile.read(path) for path in policies.split(",")}
    for file in files.values():
        file.check_model(model_shape(loaded.model))
    own_k = next(iter(files.values())).selection.k
    if k is not None:
        files = {path: file.at_k(k) for path, file in files.items()}
    makers = policies_and_strides(files)
    if others:
        makers |= exact_drafts(files) | methods_of_others(loaded, out, k or own_k, context_tokens + steps // 2)
    wanted = [name.strip() for name in only.split(";") if name.strip()]
    if unknown := set(wanted) - set(makers):
        raise ValueError(f"there is no contender {min(unknown)!r}: there are {list(makers)}.")
    of_model = [] if model is None else [re.sub("[^a-z0-9.]+", "-", Path(loaded.id).name.lower())]
    of_sizes = (
        [] if (context_tokens, steps, k or own_k) == (1536, 512, own_k) else [context_tokens, steps, f"k{k or own_k}"]
    )
    of_prompts = [] if (seed, first_index) == (0, 4) else [f"seed{seed}", f"from{first_index}"]
    path = _DOCS / "results" / f"{'-'.join(map(str, ['long-outputs', *of_model, *of_sizes, *of_prompts]))}.json"
    # Shares are of a stride, and accuracies of full attention.
    is_whole = FULL in wanted and any(name.startswith("stride 10") for name in wanted)
    if wanted and not (quick or is_whole or path.exists()):
        raise ValueError(f"{path.name} is not there, and needs rows of {FULL} and a stride 10 first: --only {only!r}.")
    contenders = {name: make() for name, make in makers.items() if not wanted or name in wanted}
    prompts = default_prompts(
        loaded.tokenizer,
        n_per_kind=1 if quick else per_kind,
        context_tokens=context_tokens,
        n_steps=steps,
        seed=seed,
        kinds=["copying"] if quick else kinds.split(","),
        first_index=first_index,
    )
    found = _run(ClosedLoopStore(out), loaded, prompts, contenders)
    result: dict[str, Any] = {
        "model": loaded.id,
        "machine": machine_name(),
        "steps": steps,
        "context_tokens": context_tokens,
        "k": k or own_k,
        "seed": seed,
        "first_index": first_index,
        "prompts": len(prompts),
        "kinds": [kind for kind in KINDS if any(prompt.kind == kind for prompt in prompts)],
        "rows": {
            name: {**_row(found[name], [prompt.kind for prompt in prompts]), **_chosen_settings(contender)}
            for name, contender in contenders.items()
        },
    }
    figure = draw(result)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "long-outputs.png", dpi=110)
    if quick:
        document = report([result])
    else:
        if wanted and path.exists():
            result = _joined(json.loads(path.read_text(encoding="utf-8")), result)
            figure = draw(result)
        if path.stem == "long-outputs":
            figure.savefig(_DOCS / "pictures" / "long-outputs.png", dpi=110)
        write_text(path, json.dumps(result))
        document = page(_DOCS / "results")
        write_text(_DOCS / "long_outputs.md", document)
    write_text(out / "long_outputs.md", document)
    print(document)
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _joined(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured before, and those that were measured now on the same prompts."""
    elsewhere = measured_elsewhere(known, found, "rows")
    return {**known, "rows": {**known["rows"], **{name: row | elsewhere for name, row in found["rows"].items()}}}


def _chosen_settings(contender: Contender) -> dict[str, Any]:
    """Settings of what is no schedule."""
    return {} if isinstance(contender, Scheduled | ExactDrafts) else {"settings": contender.settings()}


def _run(
    store: ClosedLoopStore, loaded: LoadedModel, prompts: Sequence[Prompt], contenders: Mapping[str, Contender]
) -> dict[str, list[ClosedLoop]]:
    """By contender what it did on each prompt: closed loops without the axis of policies."""
    found: dict[str, list[ClosedLoop]] = {}
    together: dict[Selection, dict[str, StepPolicy]] = {}
    for name, one in contenders.items():
        if isinstance(one, Scheduled):
            together.setdefault(one.selection, {})[name] = one.policy
        elif isinstance(one, ExactDrafts):
            how = (one.policy, one.selection, one.stop)
            found[name] = [exact_loop(store.folder, loaded, prompt, *how) for prompt in tqdm(prompts, name)]
        else:
            found[name] = method_loops(store.folder, loaded, prompts, one)
    for selection, policies in together.items():
        loops = store.run_all(loaded, prompts, list(policies.values()), selection, desc=", ".join(policies))
        for row, name in enumerate(policies):
            arrays = [{field.name: getattr(loop, field.name)[row] for field in fields(loop)} for loop in loops]
            found[name] = [ClosedLoop(**one) for one in arrays]
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
