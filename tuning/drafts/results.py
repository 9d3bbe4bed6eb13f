"""What to draft with, and when to stop: what was tried, chosen and measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from policies import PolicyFile, Selection, StepPolicy
from policies.serialize import stop_to_json
from policies.stops import StopRule
from traces.drafted_rounds import DraftedRounds, MeasuredRounds, RoundCosts
from tuning.drafts.choose import Expected


@dataclass(frozen=True)
class Drafter:
    """What drafts, what it costs, and what becomes of its drafts on the tuning prompts.

    Attributes:
        name: "tuned" for the file's policy, or "never full", and the tokens of a set.
        policy: Who decides in drafts.
        selection: How sets are chosen.
        costs: Of its rounds.
        rounds: On the tuning prompts.
        rule: The rule with the most tokens for the time there.
        tuned: What that comes to.
    """

    name: str
    policy: StepPolicy
    selection: Selection
    costs: RoundCosts
    rounds: DraftedRounds
    rule: StopRule
    tuned: Expected


@dataclass(frozen=True)
class DraftsResult:
    """A drafter with its rule, on prompts that chose neither.

    Attributes:
        drafters: All that were tried; the first is the best.
        held_out: Its rounds on held-out prompts.
        predicted: What the rule comes to there.
        fixed: The best number of drafts on the tuning prompts, and what it comes to on the held-out ones.
        measured: The same prompts, decoded.
        temperature: At which texts were drawn; 0 for the most likely token at every place.
    """

    drafters: tuple[Drafter, ...]
    held_out: DraftedRounds
    predicted: Expected
    fixed: tuple[StopRule, Expected]
    measured: MeasuredRounds
    temperature: float = 0.0

    @property
    def best(self) -> Drafter:
        """The drafter that is exported."""
        return self.drafters[0]

    @property
    def texts(self) -> str:
        """What the texts are, in words."""
        return f"texts drawn at a temperature of {self.temperature:g}" if self.temperature else "greedy texts"

    def file(self, tuned_from: PolicyFile) -> PolicyFile:
        """The policy file for `recycled(..., exact=True)`; it is of no use without."""
        best = self.best
        provenance = {name: value for name, value in tuned_from.provenance.items() if name in ("weights", "versions")}
        return dataclasses.replace(
            tuned_from,
            policy=best.policy,
            selection=best.selection,
            stop=best.rule,
            horizon_steps=None,
            provenance=provenance | {"exact": self.to_json()},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        best, (rule, of_fixed) = self.best, self.fixed
        return {
            "drafts_by": best.name,
            "temperature": self.temperature,
            "stop": stop_to_json(best.rule),
            "costs": dataclasses.asdict(best.costs),
            "tried": [
                {"drafts_by": one.name, "costs": dataclasses.asdict(one.costs), **dataclasses.asdict(one.tuned)}
                for one in self.drafters
            ],
            "predicted": dataclasses.asdict(self.predicted),
            "predicted_gain": self.predicted.tokens_per_ms * best.costs.full_ms,
            "best_fixed": {"stop": stop_to_json(rule), **dataclasses.asdict(of_fixed)},
            "measured": dataclasses.asdict(self.measured) | {"gain": self.measured.gain},
        }
