"""Is it any good? Methods side by side on real tasks, against full attention."""

from recycler.fidelity.baselines import baselines
from recycler.fidelity.fresh_top_k import FreshTopK
from recycler.fidelity.method import EveryStep, Method, Scheduled
from recycler.fidelity.outcome import Outcome, PromptOutcome
from recycler.fidelity.quest import Quest
from recycler.fidelity.token_selector import Chosen, TokenSelector

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
