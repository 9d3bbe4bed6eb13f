"""Is it any good? Methods side by side on real tasks, against full attention."""

from recycler.evaluate.baselines import baselines
from recycler.evaluate.fresh_top_k import FreshTopK
from recycler.evaluate.method import EveryStep, Method, Scheduled
from recycler.evaluate.outcome import Outcome, PromptOutcome
from recycler.evaluate.quest import Quest
from recycler.evaluate.token_selector import Chosen, TokenSelector

__all__ = [
    "Chosen",
    "EveryStep",
    "FreshTopK",
    "Method",
    "Outcome",
    "PromptOutcome",
    "Quest",
    "Scheduled",
    "TokenSelector",
    "baselines",
]
