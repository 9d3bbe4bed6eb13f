"""What policies over long outputs were to reach, and what they reach: the table of it on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from long_outputs_measures import (
    FULL,
    TUNED,
    Result,
    Row,
    better_stride,
    copying_share,
    kl_share,
    last_over_first,
    read_result,
    worst_kind,
)
from timing_report import CLOCKS, TOLD, ways_gone

_ANEW = "new sets at every step"
# At equal tokens read.
_OTHERS = ("SFI, gap 8 to 12", "DuoAttention-like", "FreeKV-like")
_QWEN = "long-outputs-qwen2.5-coder-0.5b-instruct"
_SEEDS = ("long-outputs", "long-outputs-seed1-from12", "long-outputs-seed2-from0")
_OF_QWEN = {"": "k = 128", "-1536-512-k256": "k = 256", "-16000-512-k800-seed1-from1": "16,000 tokens, k = 800 (5%)"}


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
    """Lines of the section, from the JSON files in a folder."""
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
    seeds = [read_result(folder / f"{name}.json") for name in _SEEDS]
    first = seeds[0]
    yield Aim("KL, share of the better stride 10's", 0.08, True, *_both(seeds, _share))
    yield Aim("the same of the worst kind", 0.3, True, *_both(seeds, _worst_share))
    yield Aim("last quarter's KL over the first's", 1.3, True, *_both(seeds, _last_over_first))
    yield Aim("copying accuracy, share of full attention's", 0.98, False, *_both(seeds, _copying))
    yield Aim(
        "KL over 1,024 steps, share",
        0.1,
        True,
        *_both([read_result(folder / "long-outputs-1536-1024-k128.json")], _share),
    )
    kinds = read_result(folder / "left-out.json")["kinds"].values()
    without = [kind["tuned without it"] / kind["stride 10"] for kind in kinds]
    yield Aim("KL of a kind that tuning never saw, share, each in turn", 0.2, True, without)
    for name in _OTHERS:
        tuned, other = first["rows"][TUNED], first["rows"][name]
        yield Aim(f"KL over that of {name}", 1.0, True, [kl_share(tuned, other)])
        yield Aim(f"the same of the worst kind, {name}", 1.1, True, [worst_kind(tuned, other)[1]])
    spearman = read_result(folder / "replay-validity.json")["spearman"]["weighted"]["all"]
    yield Aim("rank correlation of replayed loss and KL", 0.9, False, [spearman])
    timing = read_result(folder / "timing.json")
    told, clocks = (timing["replayed"][name] for name in (TOLD, CLOCKS))
    losses = [told[kind]["squared"] / clocks[kind]["squared"] for kind in timing["kinds"]]
    yield Aim("squared loss of who is told when the output turns, over clocks', kinds that turn", 0.75, True, losses)
    sensor, hindsight = ways_gone(timing["decoded"], "cosine_profile, tuned on these kinds")
    yield Aim("way from clocks to a sensor of the present that is gone, the same kinds", 0.5, False, [sensor])
    yield Aim("the same to hindsight", 0.25, False, [hindsight])
    of_64 = read_result(folder / "optimize-budget-0.1-64-steps.json")
    exported = next(one for one in of_64["families"] if one["family"] == of_64["exported"])
    yield Aim(
        "KL of a policy tuned on 64 steps, over 64, share", 0.1, True, [exported["kl_share_of_baseline"]["value"]]
    )
    for sizes, said in _OF_QWEN.items():
        result = read_result(folder / f"{_QWEN}{sizes}.json")
        yield Aim(f"Qwen2.5-Coder-0.5B, {said}: KL, share", 0.1, True, *_both([result], _share))
    yield Aim(
        "Qwen2.5-Coder-0.5B, k = 128, in its own words: share of full attention's score",
        0.95,
        False,
        [_own_words(folder)],
    )


def _both(results: Sequence[Result], measure: Callable[[Result, Row], float]) -> tuple[list[float], list[float]]:
    """A measure of the tuned policy, and of new sets at every step where they were decoded."""
    found = [measure(result, result["rows"][TUNED]) for result in results]
    return found, [measure(result, result["rows"][_ANEW]) for result in results if _ANEW in result["rows"]]


def _share(result: Result, row: Row) -> float:
    return kl_share(row, better_stride(result["rows"]))


def _worst_share(result: Result, row: Row) -> float:
    return worst_kind(row, better_stride(result["rows"]))[1]


def _last_over_first(_: Result, row: Row) -> float:
    return last_over_first(row)


def _copying(result: Result, row: Row) -> float:
    return copying_share(row, result["rows"][FULL])


def _own_words(folder: Path) -> float:
    rows = read_result(folder / "own-words-qwen2.5-coder-0.5b.json")["rows"]
    found = {row["method"]: row["value"] for row in rows if (row["task"], row["measure"]) == ("all", "accuracy_kept")}
    return float(next(value for method, value in found.items() if method.startswith("tuned")))


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
