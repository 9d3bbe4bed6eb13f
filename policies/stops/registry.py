"""Which rules there are: the built-in ones and those that installed packages register."""

from __future__ import annotations

from policies.registry import Kinds
from policies.stops.base import StopRule
from policies.stops.budgeted_drafts import BudgetedDrafts
from policies.stops.confident_drafts import ConfidentDrafts
from policies.stops.fixed_drafts import FixedDrafts
from policies.stops.learned_drafts import LearnedDrafts

RULES: Kinds[StopRule] = Kinds(
    "stop rule", StopRule, "recycler.stops", (FixedDrafts, ConfidentDrafts, LearnedDrafts, BudgetedDrafts)
)
