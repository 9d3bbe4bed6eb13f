"""When to stop drafting and verify: the rules, and what they see."""

from policies.stops.base import DraftSignals, Outlook, StopRule
from policies.stops.budgeted_drafts import BudgetedDrafts
from policies.stops.confident_drafts import ConfidentDrafts
from policies.stops.fixed_drafts import FixedDrafts
from policies.stops.learned_drafts import LearnedDrafts

__all__ = [
    "BudgetedDrafts",
    "ConfidentDrafts",
    "DraftSignals",
    "FixedDrafts",
    "LearnedDrafts",
    "Outlook",
    "StopRule",
]
