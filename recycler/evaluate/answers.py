"""Running methods on a prompt: teacher-forced along the reference, and in the model's own words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from policies import AlwaysFull, Selection
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.rows import Rows
from recycler.evaluate.method import Method, Scheduled, begin
from recycler.evaluate.outcome import Outcome, PromptOutcome
from recycler.measure.closed_loop import Followed, follow
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.loading import LoadedModel
from recycler.tasks import TaskPrompt

FULL = Scheduled("full", "stock attention", AlwaysFull(), Selection(1, sinks=0, window=0))


def measure(loaded: LoadedModel, task: TaskPrompt, methods: Sequence[Method], *, fast: bool = True) -> PromptOutcome:
    """Run full attention and several methods on a prompt, which is read once.

    Args:
        loaded: The model.
        task: The prompt, its reference and its score.
        methods: What to compare with full attention, whose outcome is always there, under the name `full`.
        fast: False keeps to the plain path.

    Raises:
        ValueError: If prompt and answer are longer than the model's positions, a method is for another model shape, or
            two have the same name.
    """
    names = [FULL.name, *(method.name for method in methods)]
    if len(set(names)) < len(names):
        raise ValueError(f"methods need names of their own, and one of {', '.join(names)} is there twice.")
    tokens = torch.as_tensor(task.prompt.tokens.astype(np.int64), device=loaded.model.device)
    n_prompt = task.prompt.n_prompt_tokens
    prompt = read_prompt(
        loaded.model,
        tokens[:n_prompt],
        max(task.n_new_tokens, len(tokens) - n_prompt),
        prompt_queries={method.prompt_queries for method in methods},
    )
    reference = tokens[n_prompt:]
    full_log_p: list[Tensor] = []

    def noted(step: int, log_p: Tensor) -> Tensor:
        full_log_p.append(log_p[0])
        return log_p[0]

    (full,) = _outcomes(follow(FULL.begin(loaded.model, prompt, fast=fast), reference, noted))
    outcomes = {FULL.name: full}
    for places, rows in begin(loaded.model, prompt, methods, fast=fast):
        found = _outcomes(follow(rows, reference, lambda step, _: full_log_p[step]))
        outcomes |= {methods[place].name: outcome for place, outcome in zip(places, found, strict=True)}
    full_log_p.clear()
    if task.n_new_tokens:
        everyone = [FULL, *methods]
        for places, rows in begin(loaded.model, prompt, everyone, fast=fast):
            for place, answered in zip(places, _answers(loaded, prompt, rows, task), strict=True):
                name = everyone[place].name
                outcomes[name] = dataclasses.replace(outcomes[name], **answered._asdict())
    return PromptOutcome(task.prompt.name, task.prompt.kind, n_prompt, {name: outcomes[name] for name in names})


def measure_once(store: Store, loaded: LoadedModel, task: TaskPrompt, methods: Sequence[Method]) -> PromptOutcome:
    """`measure`, or what an equal measurement left in a store; answers are scored anew, whoever wrote them down.

    Args:
        store: Where outcomes are kept.
        loaded: As in `measure`, like what follows.
        task: The prompt.
        methods: What to compare with full attention.
    """
    depends_on = {
        "methods on": digest_of_tokens(task.prompt.tokens),
        "name": task.prompt.name,
        "task": task.prompt.kind,
        "n_prompt_tokens": task.prompt.n_prompt_tokens,
        "n_new_tokens": task.n_new_tokens,
        "methods": {method.name: method.settings() for method in methods},
    }

    def compute() -> dict[str, np.ndarray]:
        return {"outcome": np.array(json.dumps(measure(loaded, task, methods).to_json()))}

    kept = PromptOutcome.from_json(json.loads(str(store.get(loaded, depends_on, compute)["outcome"])))
    rescored = {
        name: one if one.answer is None else dataclasses.replace(one, score=task.score(one.answer))
        for name, one in kept.methods.items()
    }
    return dataclasses.replace(kept, methods=rescored)


class _Answer(NamedTuple):
    """The fields of `Outcome` that the model's own words give."""

    answer: str
    score: float
    answer_full_share: float
    answer_read_share: float


def _outcomes(found: Followed) -> list[Outcome]:
    """One for each row."""
    return [
        Outcome(
            kl=found.kl[row],
            agreement=found.agreement[row],
            # The last step has no next token in the text.
            accuracy=found.accuracy[row, :-1],
            nll_change=found.nll_change[row, :-1],
            full_share=float(found.full[row].mean()),
            read_share=float(found.read_share[row].mean()),
        )
        for row in range(len(found.kl))
    ]


def _answers(loaded: LoadedModel, prompt: ReadPrompt, rows: Rows, task: TaskPrompt) -> list[_Answer]:
    """Let every row write on greedily, as stock `generate` does."""
    ends = _end_tokens(loaded)
    tokens = prompt.logits.argmax(-1).expand(rows.n_rows)
    written: list[np.ndarray] = []
    alive = np.ones(rows.n_rows, dtype=bool)
    # Of each step, by row; NaN once a row has ended.
    full_shares, read_shares = [], []
    while True:
        fed = tokens.cpu().numpy()
        written.append(fed)
        alive = alive & ~np.isin(fed, ends)
        if len(written) == task.n_new_tokens or not alive.any():
            break
        done = rows.step(tokens)
        full_shares.append(np.where(alive, done.full.mean((1, 2)), np.nan))
        read_shares.append(np.where(alive, done.tokens_read.mean((1, 2)) / done.dense_tokens, np.nan))
        tokens = done.logits.argmax(-1)
    found = []
    for row in range(rows.n_rows):
        own = [int(step[row]) for step in written]
        end = next((place for place, token in enumerate(own) if token in ends), len(own))
        text = str(loaded.tokenizer.decode(own[:end]))
        shares = (_mean_while_alive([one[row] for one in of_steps]) for of_steps in (full_shares, read_shares))
        found.append(_Answer(text, task.score(text), *shares))
    return found


def _mean_while_alive(values: Sequence[float]) -> float:
    """Mean over the steps that a row took; 0 if it took none."""
    taken = [value for value in values if not np.isnan(value)]
    return float(np.mean(taken)) if taken else 0.0


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Tokens at which the model's own `generate` stops."""
    config = loaded.model.generation_config
    ends = None if config is None else config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
