"""All methods on all prompts: first what the model can do at all, then who keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from recycler.evaluate.answers import measure_once
from recycler.evaluate.method import Method
from recycler.evaluate.outcome import PromptOutcome
from recycler.evaluate.summary import can_do
from recycler.measure.store import Store
from recycler.model.loading import LoadedModel
from recycler.model.shape import check_positions
from recycler.tasks import TASKS, TaskPrompt

# Enough to tell a task that the model does from one that it does not.
_SCREENING_PROMPTS = 4


@dataclass(frozen=True)
class Screened:
    """What full attention makes of a task.

    Attributes:
        task: Its name.
        score: Mean score of full attention on some prompts; None for a task that is only teacher-forced.
        chance: What guessing would score.
        compared: Whether methods are compared on it.
    """

    task: str
    score: float | None
    chance: float
    compared: bool


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        outcomes: One for each prompt; of a task that full attention cannot do, only full attention's.
        screened: One for each task.
    """

    outcomes: tuple[PromptOutcome, ...]
    screened: tuple[Screened, ...]


def check_lengths(loaded: LoadedModel, prompts: Sequence[TaskPrompt]) -> None:
    """Refuse prompts that the model has no positions for, before anything is computed.

    Raises:
        ValueError: Naming the task.
    """
    for task in prompts:
        try:
            check_positions(loaded.model, task.prompt.n_prompt_tokens, max(task.n_new_tokens, task.prompt.n_steps))
        except ValueError as error:
            raise ValueError(f"task {task.prompt.kind}: {error}") from error


def compare(loaded: LoadedModel, prompts: Sequence[TaskPrompt], methods: Sequence[Method], store: Store) -> Comparison:
    """Run all methods on the prompts of the tasks that full attention can do.

    Args:
        loaded: The model.
        prompts: Of some tasks of `recycler.tasks.TASKS`.
        methods: What to compare with full attention.
        store: Where outcomes are kept, so that an interrupted comparison goes on.

    Raises:
        ValueError: If a prompt is longer than the model's positions, or a method is for another model shape.
    """
    check_lengths(loaded, prompts)
    by_task: dict[str, list[TaskPrompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.prompt.kind, []).append(prompt)
    screening = [
        prompt for task in by_task.values() for prompt in task[:_SCREENING_PROMPTS] if prompt.n_new_tokens and methods
    ]
    alone: dict[str, list[PromptOutcome]] = {}
    for prompt in tqdm(screening, desc="what full attention can do", unit="prompt"):
        alone.setdefault(prompt.prompt.kind, []).append(measure_once(store, loaded, prompt, ()))
    screened = tuple(_screened(task, alone.get(task, [])) for task in by_task)
    compared = {one.task for one in screened if one.compared}
    outcomes = [outcome for task, some in alone.items() if task not in compared for outcome in some]
    todo = [prompt for prompt in prompts if prompt.prompt.kind in compared]
    for prompt in tqdm(todo, desc="comparing", unit="prompt"):
        outcomes.append(measure_once(store, loaded, prompt, methods))
    order = {task: place for place, task in enumerate(by_task)}
    return Comparison(tuple(sorted(outcomes, key=lambda outcome: order[outcome.task])), screened)


def _screened(task: str, outcomes: Sequence[PromptOutcome]) -> Screened:
    scores = [outcome.methods["full"].score for outcome in outcomes]
    known = [score for score in scores if score is not None]
    chance = TASKS[task].chance
    return Screened(task, float(np.mean(known)) if known else None, chance, can_do(outcomes, chance))
