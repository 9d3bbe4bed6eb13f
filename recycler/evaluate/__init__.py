"""Is it any good? Methods side by side on real tasks, against full attention."""

from recycler.evaluate.baselines import baselines
from recycler.evaluate.kascade import Kascade
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.outcome import Outcome, PromptOutcome
from recycler.evaluate.quest import Quest

__all__ = ["Kascade", "Method", "Outcome", "PromptOutcome", "Quest", "Scheduled", "baselines"]
