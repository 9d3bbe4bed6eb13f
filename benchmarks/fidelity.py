"""`python benchmarks/fidelity.py`: tune a policy, compare it with baselines, ask if replay predicts the truth.

Floor and ceiling are rows of the table: full attention (KL 0, all tokens read) and a new set at every step. Everything
is kept in the output folder as it comes, so an interrupted run goes on where it stopped. `--quick` is a rehearsal of
all stages in a few minutes; its numbers mean little, and it writes to the output folder only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Annotated, Any

import typer
from machine import machine_name
from replay_validity import TUNED_ON, Validity, draw_validity, validity_of

from policies import PolicyFile
from recycler.evaluate import __main__ as evaluate
from recycler.model.loading import load_model
from traces.reporting.command import run_command
from tuning import optimize

_ROOT = Path(__file__).parents[1]
# What people made of the numbers; it goes above them.
_NOTES = _ROOT / "docs" / "results_notes.md"
_SCHEDULERS = (
    "All families, clocks with three sets, a schedule that knows the future and a new set at every step, at budgets of "
    "2 to 20% and two lengths: [schedulers.md](schedulers.md), written by `python benchmarks/schedulers.py`."
)
# RefreshKV's own comparison, worst first (arXiv 2411.05787).
_PAPER_ORDER = ("streaming_llm", "snapkv", "refreshkv_s10", "refreshkv_qc5_tuned", "full")


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        context_tokens: Of every prompt.
        steps: Of natural texts and long answers.
        prompts: Per task.
        per_kind: Recorded prompts per kind, half of them held out.
        trials: Of the tuner, per family.
        families: That are tuned; empty for all.
        tasks: That are compared; empty for all.
    """

    context_tokens: int
    steps: int
    prompts: int
    per_kind: int
    trials: int
    families: str
    tasks: str


_FULL_SIZE = Size(
    2048,
    64,
    5,
    4,
    40,
    "",
    # Those that there were when docs/results.md was written; table_rewriting and several_questions came later.
    "single_needle,multi_key_needle,multi_value_needle,multi_query_needle,variable_tracking,common_words,"
    "frequent_words,copying,key_values,word_list,few_shot,prose,technical,code",
)
_QUICK_SIZE = Size(384, 20, 1, 2, 6, "stride_profile,fixed_stride", "single_needle,copying,key_values,few_shot,prose")


def main(
    k: Annotated[int, typer.Option(help="Tokens of a set.")] = 128,
    budget: Annotated[float, typer.Option(help="Share of unit-steps that may run full.")] = 0.1,
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/fidelity-benchmark"),
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal in a few minutes.")] = False,
    context_tokens: Annotated[int | None, typer.Option(help="Prompt tokens; default: 2,048 (quick: 384).")] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts per task; default: 5 (quick: 1).")] = None,
) -> dict[str, Any]:
    """Compare a tuned policy with every baseline, and write the report."""
    began = time.perf_counter()
    size = _QUICK_SIZE if quick else _FULL_SIZE
    n_context = context_tokens or size.context_tokens
    folder = out / ("quick" if quick else f"{n_context}-k{k}-{budget:g}")
    tuned = optimize.main(
        budget=budget,
        out=folder / "tuned",
        traces=None,
        model=None,
        dtype="float32",
        device=None,
        families=size.families,
        trials=size.trials,
        candidates=2,
        seed=0,
        storage=None,
        k=str(k),
        context_tokens=n_context,
        steps=size.steps,
        per_kind=size.per_kind,
    )
    policy = Path(tuned["policy"])
    validity = validity_of(load_model(None), folder / "tuned", per_kind=size.per_kind // 2)
    compared = evaluate.main(
        policy=[policy],
        tasks=size.tasks,
        methods="",
        prompts=prompts or size.prompts,
        context_tokens=n_context,
        steps=size.steps,
        first_index=size.per_kind,
        seed=0,
        out=folder / "compared",
        model=None,
        dtype="float32",
        device=None,
    )
    correlations = {loss: validity.correlations(loss) for loss in validity.losses}
    everything = {
        **json.loads((folder / "compared" / "results.json").read_text(encoding="utf-8")),
        "replay_validity": {
            "policies": validity.labels,
            "kinds": list(validity.kinds),
            "kl": validity.kl.round(6).tolist(),
            "losses": {name: loss.round(6).tolist() for name, loss in validity.losses.items()},
            "spearman": correlations,
        },
        "policy": PolicyFile.read(policy).to_json(),
        "machine": machine_name(),
    }
    caption = f"{compared['model']}, k = {k} tokens, {n_context:,} tokens of context, {machine_name()}"
    draw_validity(validity, TUNED_ON, caption).savefig(folder / "replay-validity.png", dpi=110)
    minutes = round((time.perf_counter() - began) / 60, 1)
    report = _report(compared, validity, folder, caption)
    evaluate.write_beside(folder / "results.md", report)
    if not quick:
        _publish(folder, everything, report)
    return {
        **{name: compared[name] for name in ("model", "k", "context_tokens", "rows")},
        "spearman": correlations,
        "minutes": minutes,
    }


def _report(compared: dict[str, Any], validity: Validity, folder: Path, caption: str) -> str:
    """The document of all results."""
    return "\n".join(
        [
            "# Results",
            "",
            f"Written by `python benchmarks/fidelity.py`: {caption}. What the methods are, and where they differ from "
            "their papers, is in `recycler/evaluate/baselines.py`; what was learnt, in [LOG.md](LOG.md).",
            "",
            *([_NOTES.read_text(encoding="utf-8")] if _NOTES.exists() else []),
            "## Methods at equal k",
            "",
            "![ranking](pictures/fidelity-ranking.png)",
            "",
            (folder / "compared" / "tables.md").read_text(encoding="utf-8"),
            "## Schedules at every budget",
            "",
            _SCHEDULERS,
            "",
            "![KL and copying against the full share](pictures/schedulers-3000-k128.png)",
            "",
            "## How the error compounds",
            "",
            "![curves](pictures/fidelity-curves.png)",
            "",
            "## The paper's ordering",
            "",
            *_ordering(compared["rows"]),
            "",
            "## Does replay predict the truth?",
            "",
            f"Spearman's rank correlation over {len(validity.labels)} policies of all families between the replayed "
            f"loss and closed-loop KL, on prompts that no policy was tuned on; the tuner minimises `{TUNED_ON}`.",
            "",
            *_correlations(validity),
            "",
            "![replay against closed loop](pictures/replay-validity.png)",
            "",
        ]
    )


def _ordering(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether methods come in the paper's order, by task: higher accuracy, or lower KL where nothing is answered."""
    values = {(row["method"], row["task"], row["measure"]): row["value"] for row in rows}
    lines = [
        "RefreshKV reports StreamingLLM < SnapKV <= fixed stride < dynamic <= full. Here, by own answers (accuracy) "
        "and teacher-forced (KL, lower is better):",
        "",
        f"| task, measure | {' | '.join(_PAPER_ORDER)} | in this order |",
        f"|---|{'---:|' * len(_PAPER_ORDER)}---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        for measure, sign in (("accuracy", 1), ("kl", -1)):
            found = [values.get((method, task, measure)) for method in _PAPER_ORDER]
            known = [value for value in found if value is not None]
            if len(known) < len(found):
                continue
            broken = [
                f"{_PAPER_ORDER[at]} > {_PAPER_ORDER[at + 1]}"
                for at in range(len(known) - 1)
                if sign * (known[at] - known[at + 1]) > 0
            ]
            cells = " | ".join(f"{value:.3f}" for value in known)
            lines.append(f"| {task}, {measure} | {cells} | {'yes' if not broken else 'no: ' + '; '.join(broken)} |")
    return lines


def _correlations(validity: Validity) -> list[str]:
    by_loss = {loss: validity.correlations(loss) for loss in validity.losses}
    kinds = list(next(iter(by_loss.values())))
    return [
        f"| replayed loss | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
        *(f"| {loss} | {' | '.join(f'{found[kind]:.3f}' for kind in kinds)} |" for loss, found in by_loss.items()),
    ]


def _publish(folder: Path, everything: dict[str, Any], report: str) -> None:
    """Put the report, its pictures and its numbers where the README points."""
    machine = re.sub("[^0-9A-Za-z]+", "-", machine_name()).strip("-")
    evaluate.write_beside(_ROOT / "benchmarks" / "results" / f"fidelity-{machine}.json", json.dumps(everything))
    evaluate.write_beside(_ROOT / "docs" / "results.md", report)
    pictures = _ROOT / "docs" / "pictures"
    copyfile(folder / "compared" / "ranking.png", pictures / "fidelity-ranking.png")
    copyfile(folder / "compared" / "curves.png", pictures / "fidelity-curves.png")
    copyfile(folder / "replay-validity.png", pictures / "replay-validity.png")


if __name__ == "__main__":
    run_command(main)
