"""What policies over long outputs were to reach, and what they reach: the table of it on the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
_TUNED, _ANEW, _FULL = "tuned on 512 steps", "new sets at every step", "full attention"
# At equal tokens read.
_OTHERS = ("SFI, gap 8 to 12", "DuoAttention-like", "FreeKV-like")
_QWEN = "long-outputs-qwen2.5-coder-0.5b-instruct"


@dataclass(frozen=True)
class Aim:
    """A line of the table.

    Attributes:
        what: Of what.
        aim: The number that was aimed at.
        at_most: Whether less is better.
        found: What was found, of each seed or context.
        limit: The same of new sets at every step; empty where they were not decoded.
    """

    what: str
    aim: float
    at_most: bool
    found: Sequence[float]
    limit: Sequence[float] = ()

    @property
    def line(self) -> str:
        met = [value <= self.aim if self.at_most else value >= self.aim for value in self.found]
        said = "yes" if all(met) else "no" if not any(met) else f"{sum(met)} of {len(met)}"
        cells = [self.what, f"{'at most' if self.at_most else 'at least'} {self.aim:g}"]
        return f"| {' | '.join([*cells, _told(self.found), said, _told(self.limit)])} |"


def aims(folder: Path) -> list[str]:
    """Lines of the section, from the JSON files in a folder that are there."""
    return [
        "## What was aimed at",
        "",
        "A tenth full, k = 128, 512 steps after 1,536 tokens, where nothing else is said; one number for each seed of",
        "prompts and search. The last column is where looking more often ends: every unit chooses a new set of the",
        "same size at every step.",
        "",
        "| what | aim | found | met | new sets at every step |",
        "|---|---|---|---|---|",
        *(aim.line for aim in _aims(folder)),
    ]


def _aims(folder: Path) -> Iterator[Aim]:
    seeds = [_read(folder / f"{name}.json") for name in _SEEDS]
    first = seeds[0]
    yield Aim("KL, share of the better stride 10's", 0.08, True, *_both(seeds, _share))
    yield Aim("the same of the worst kind", 0.3, True, *_both(seeds, _worst_share))
    yield Aim("last quarter's KL over the first's", 1.3, True, *_both(seeds, _last_over_first))
    yield Aim("copying accuracy, share of full attention's", 0.98, False, *_both(seeds, _copying))
    yield Aim(
        "KL over 1,024 steps, share", 0.1, True, *_both([_read(folder / "long-outputs-1536-1024-k128.json")], _share)
    )
    kinds = _read(folder / "left-out.json")["kinds"].values()
    without = [kind["tuned without it"] / kind["stride 10"] for kind in kinds]
    yield Aim("KL of a kind that tuning never saw, share, each in turn", 0.2, True, without)
    for name in _OTHERS:
        tuned, other = first["rows"][_TUNED], first["rows"][name]
        worst = max(tuned["kinds"][kind]["kl"] / other["kinds"][kind]["kl"] for kind in first["kinds"])
        yield Aim(f"KL over that of {name}", 1.0, True, [tuned["kl"] / other["kl"]])
        yield Aim(f"the same of the worst kind, {name}", 1.1, True, [worst])
    spearman = _read(folder / "replay-validity.json")["spearman"]["weighted"]["all"]
    yield Aim("rank correlation of replayed loss and KL", 0.9, False, [spearman])
    of_64 = _read(folder / "optimize-budget-0.1-64-steps.json")
    exported = next(one for one in of_64["families"] if one["family"] == of_64["exported"])
    yield Aim(
        "KL of a policy tuned on 64 steps, over 64, share", 0.1, True, [exported["kl_share_of_baseline"]["value"]]
    )
    for sizes, said in _OF_QWEN.items():
        if (path := folder / f"{_QWEN}{sizes}.json").exists():
            yield Aim(f"Qwen2.5-Coder-0.5B, {said}: KL, share", 0.1, True, *_both([_read(path)], _share))
    yield Aim("the same in its own words: share of full attention's score", 0.95, False, [_own_words(folder)])


_SEEDS = ("long-outputs", "long-outputs-seed1-from12", "long-outputs-seed2-from0")
_OF_QWEN = {"": "k = 128", "-1536-512-k256": "k = 256", "-16000-512-k800-seed1-from1": "16,000 tokens, k = 800 (5%)"}


def _both(
    results: Sequence[Result], measure: Callable[[Result, Mapping[str, Any]], float]
) -> tuple[list[float], list[float]]:
    """A measure of the tuned policy, and of new sets at every step where they were decoded."""
    found = [measure(result, result["rows"][_TUNED]) for result in results]
    return found, [measure(result, result["rows"][_ANEW]) for result in results if _ANEW in result["rows"]]


def _share(result: Result, row: Mapping[str, Any]) -> float:
    return float(row["kl"] / _stride(result)["kl"])


def _worst_share(result: Result, row: Mapping[str, Any]) -> float:
    of_stride = _stride(result)["kinds"]
    return max(float(row["kinds"][kind]["kl"] / of_stride[kind]["kl"]) for kind in result["kinds"])


def _last_over_first(_: Result, row: Mapping[str, Any]) -> float:
    return float(row["quarters"][-1] / row["quarters"][0])


def _copying(result: Result, row: Mapping[str, Any]) -> float:
    return float(row["kinds"]["copying"]["accuracy"] / result["rows"][_FULL]["kinds"]["copying"]["accuracy"])


def _own_words(folder: Path) -> float:
    rows = _read(folder / "own-words-qwen2.5-coder-0.5b.json")["rows"]
    found = {row["method"]: row["value"] for row in rows if (row["task"], row["measure"]) == ("all", "accuracy_kept")}
    return float(next(value for method, value in found.items() if method.startswith("tuned")))


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _read(path: Path) -> Result:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _stride(result: Result) -> Mapping[str, Any]:
    rows = [row for name, row in result["rows"].items() if name.startswith("stride 10")]
    return min(rows, key=lambda row: float(row["kl"]))
