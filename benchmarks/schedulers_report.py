"""What the outcomes of `schedulers.py` say: every method, the targets, the document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recycler.evaluate.outcome import PromptOutcome
from traces.reporting.estimate import bootstrap, bootstrap_ratio

_ROOT = Path(__file__).parents[1]
# What people made of the numbers; it goes above them.
_NOTES = _ROOT / "docs" / "schedulers_notes.md"
BUDGETS = (0.02, 0.05, 0.1, 0.2)
# The one that every family and the oracle are shown at.
MAIN_BUDGET = 0.1


@dataclass(frozen=True)
class Setting:
    """How much is run at one size.

    Attributes:
        context_tokens: Of every prompt.
        k: Tokens of a set.
        steps: Of every prompt.
        per_kind: Prompts per kind; the later half is held out.
        trials: Of the tuner, per family and budget.
        tuned_at: Another setting, whose policies and sizes are used here as they are, the sizes in proportion to k;
            None to tune here.
        first_index: Index of the first prompt of each kind. Where nothing is tuned all prompts are held out, and this
            keeps them clear of the texts of the other setting's.
    """

    context_tokens: int
    k: int
    steps: int
    per_kind: int
    trials: int
    tuned_at: str | None = None
    first_index: int = 0

    @property
    def name(self) -> str:
        return f"{self.context_tokens}-k{self.k}"


def kept(outcome: PromptOutcome) -> dict[str, Any]:
    """Means over the steps of a prompt."""
    return {
        "name": outcome.name,
        "kind": outcome.task,
        "methods": {
            name: {
                "kl": round(float(one.kl.mean()), 6),
                "accuracy": round(float(one.accuracy.mean()), 6),
                "full_share": round(one.full_share, 6),
                "read_share": round(one.read_share, 6),
            }
            for name, one in outcome.methods.items()
        },
    }


def _of_kind(outcomes: Sequence[PromptOutcome], kind: str | None) -> list[PromptOutcome]:
    return [outcome for outcome in outcomes if kind in (None, outcome.task)]


def _kl(outcomes: Sequence[PromptOutcome], method: str) -> np.ndarray:
    return np.array([outcome.methods[method].kl.mean() for outcome in outcomes])


def _accuracy(outcomes: Sequence[PromptOutcome], method: str) -> np.ndarray:
    return np.array([outcome.methods[method].accuracy.mean() for outcome in outcomes])


def rows(outcomes: Sequence[PromptOutcome]) -> list[dict[str, Any]]:
    """Every method: full share, KL over all prompts and by kind, and what it keeps of copying."""
    kinds = list(dict.fromkeys(outcome.task for outcome in outcomes))
    copying = _of_kind(outcomes, "copying")
    found = []
    for method in outcomes[0].methods:
        kl = bootstrap(_kl(outcomes, method))
        found.append(
            {
                "method": method,
                "full_share": float(np.mean([outcome.methods[method].full_share for outcome in outcomes])),
                "read_share": float(np.mean([outcome.methods[method].read_share for outcome in outcomes])),
                "kl": [kl.value, kl.low, kl.high],
                "kl_by_kind": {kind: float(_kl(_of_kind(outcomes, kind), method).mean()) for kind in kinds},
                "copying_kept": float(_accuracy(copying, method).mean() / _accuracy(copying, "full").mean()),
            }
        )
    return found


def targets(outcomes: Sequence[PromptOutcome]) -> dict[str, Any]:
    """The numbers that the project has set itself targets for; see docs/schedulers.md."""
    tuned, plain = f"tuned {MAIN_BUDGET:g}", f"stride {1 / MAIN_BUDGET:g}, RefreshKV's set"
    copying, prose = _of_kind(outcomes, "copying"), _of_kind(outcomes, "prose")
    clocks = [f"stride {1 / MAIN_BUDGET:g}", f"stride {1 / MAIN_BUDGET:g}, same set"]
    best = min(clocks, key=lambda name: float(_kl(outcomes, name).mean()))
    same = f"stride {1 / MAIN_BUDGET:g}, same set"
    ceiling = "new set at every step, unpooled"
    at = {name: float(_kl(outcomes, name).mean()) for name in (tuned, best, plain, ceiling)}
    kept = bootstrap_ratio(_accuracy(copying, tuned), _accuracy(copying, "full"))
    of_plain = bootstrap_ratio(_kl(prose, tuned), _kl(prose, plain))
    of_same, of_best = (bootstrap_ratio(_kl(outcomes, tuned), _kl(outcomes, name)) for name in (same, best))
    nowhere_worse = {}
    for budget in BUDGETS:
        by_kind = {}
        for kind in dict.fromkeys(outcome.task for outcome in outcomes):
            some = _of_kind(outcomes, kind)
            strides = [f"stride {1 / budget:g}", f"stride {1 / budget:g}, same set"]
            least = min(float(_kl(some, name).mean()) for name in strides)
            by_kind[kind] = float(_kl(some, f"tuned {budget:g}").mean()) / least
        nowhere_worse[f"{budget:g}"] = by_kind
    return {
        "copying_kept": dataclasses.asdict(kept),
        "prose_kl_of_plain": dataclasses.asdict(of_plain),
        "kl_of_same_set": dataclasses.asdict(of_same),
        "kl_of_best_set": dataclasses.asdict(of_best),
        "gap_closed": (at[best] - at[tuned]) / (at[best] - at[ceiling]),
        "gap_closed_from_plain": (at[plain] - at[tuned]) / (at[plain] - at[ceiling]),
        "kl_of_best_stride_by_kind": nowhere_worse,
    }


def report(settings: Sequence[Setting], everything: Mapping[str, Any]) -> str:
    """The document: targets, then every method."""
    lines = [
        "# Schedulers",
        "",
        f"Written by `python benchmarks/schedulers.py`: {everything['model']}, {everything['machine']}. No policy was "
        "tuned or chosen on these prompts. What was tried, and what did not help, is in [LOG.md](LOG.md).",
        "",
        *([_NOTES.read_text(encoding="utf-8")] if _NOTES.exists() else []),
    ]
    for setting in settings:
        of_methods, goals = everything["rows"][setting.name], everything["targets"][setting.name]
        n_prompts = len(everything["outcomes"][setting.name])
        lines += [
            f"## {setting.context_tokens:,} tokens, k = {setting.k}",
            "",
            f"{n_prompts} prompts x {setting.steps} steps, budget {MAIN_BUDGET:g} unless said otherwise."
            + (
                "" if setting.tuned_at is None else f" Policies and sizes are those tuned at {setting.tuned_at} tokens."
            ),
            "",
            f"![KL and copying against the full share](pictures/schedulers-{setting.name}.png)",
            "",
            "| what | here | target |",
            "|---|---:|---:|",
            f"| copying: share of full attention's accuracy kept | {_spelled(goals['copying_kept'])} | 0.97 |",
            "| prose: KL as a share of that of RefreshKV's stride 10 with its own set | "
            f"{_spelled(goals['prose_kl_of_plain'])} | 0.33 |",
            f"| KL as a share of that of stride 10 with the same set | {_spelled(goals['kl_of_same_set'])} | 0.5 |",
            "| KL as a share of that of stride 10 with the better of our two sets | "
            f"{_spelled(goals['kl_of_best_set'])} | |",
            "| share of the KL gap between that and a new set at every step that is closed | "
            f"{goals['gap_closed']:.2f} | 0.7 |",
            "",
            "KL as a share of that of the best fixed stride, with the better of our two sets, at the same budget:",
            "",
            *_by_kind(goals["kl_of_best_stride_by_kind"]),
            "",
            *_table(of_methods),
            "",
        ]
    return "\n".join(lines)


def _spelled(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _by_kind(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    kinds = list(next(iter(ratios.values())))
    return [
        f"| budget | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
        *(f"| {budget} | {' | '.join(f'{of[kind]:.2f}' for kind in kinds)} |" for budget, of in ratios.items()),
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = list(rows[0]["kl_by_kind"])
    lines = [
        f"| method | full | read | KL, nats per step | {' | '.join(kinds)} | copying kept |",
        f"|---|---:|---:|---:|{'---:|' * len(kinds)}---:|",
    ]
    for row in sorted(rows, key=lambda row: row["kl"][0]):
        value, low, high = row["kl"]
        by_kind = " | ".join(f"{row['kl_by_kind'][kind]:.3f}" for kind in kinds)
        lines.append(
            f"| {row['method']} | {100 * row['full_share']:.1f}% | {100 * row['read_share']:.0f}% | "
            f"{value:.3f} [{low:.3f}, {high:.3f}] | {by_kind} | {row['copying_kept']:.2f} |"
        )
    return lines
