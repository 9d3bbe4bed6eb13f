"""Rules that end rounds of drafts, as `python -m tuning.exact` learned them for machines of different costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from policies.serialize import stop_from_json
from policies.stops import StopRule
from traces.drafted_rounds import RoundCosts


@dataclass(frozen=True)
class TunedRule:
    """A rule, and what a round costs where it was learned for.

    Attributes:
        where: Machine, batch and context, in words.
        rule: The rule.
        costs: What it was told.
    """

    where: str
    rule: StopRule
    costs: RoundCosts


def tuned_rules(path: Path) -> list[TunedRule]:
    """Those of a file such as `docs/results/exact-tuned.json`; the first is of two CPU cores."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [TunedRule(run["where"], stop_from_json(run["stop"]), RoundCosts(**run["costs"])) for run in runs]
