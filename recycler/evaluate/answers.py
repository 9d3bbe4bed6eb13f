"""Running methods on a prompt: teacher-forced along the reference, and in the model's own words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from policies import AlwaysFull, Selection
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.rows import DecodeRows, RowsStep
from recycler.evaluate.method import Method, Scheduled, begin
from recycler.evaluate.outcome import Outcome, PromptOutcome
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
    ((_, rows),) = begin(loaded.model, prompt, [FULL], fast=fast)
    log_p, (full,) = _follow(rows, 1, reference, None)
    outcomes = {FULL.name: full}
    for places, rows in begin(loaded.model, prompt, methods, fast=fast):
        _, found = _follow(rows, len(places), reference, log_p)
        outcomes |= {methods[place].name: outcome for place, outcome in zip(places, found, strict=True)}
    del log_p
    if task.n_new_tokens:
        everyone = [FULL, *methods]
        for places, rows in begin(loaded.model, prompt, everyone, fast=fast):
            for place, answered in zip(places, _answers(loaded, prompt, rows, len(places), task), strict=True):
                name = everyone[place].name
                outcomes[name] = dataclasses.replace(outcomes[name], **answered._asdict())
    return PromptOutcome(task.prompt.name, task.prompt.kind, n_prompt, {name: outcomes[name] for name in names})


class _Answer(NamedTuple):
    """The fields of `Outcome` that the model's own words give."""

    answer: str
    score: float
    answer_full_share: float
    answer_read_share: float


class _Shares:
    """Full share and share of dense reading of some rows, over the steps at which they are alive."""

    def __init__(self) -> None:
        self._full: list[np.ndarray] = []
        self._read: list[np.ndarray] = []
        self._alive: list[np.ndarray] = []

    def add(self, step: RowsStep, alive: np.ndarray) -> None:
        self._full.append(step.full.mean((1, 2)))
        self._read.append(step.tokens_read.mean((1, 2)) / step.dense_tokens)
        self._alive.append(alive)

    def of(self, row: int) -> tuple[float, float]:
        alive = [one[row] for one in self._alive]
        if not any(alive):
            return 0.0, 0.0
        full, read = (np.array([one[row] for one in part])[alive].mean() for part in (self._full, self._read))
        return float(full), float(read)


def _follow(
    rows: DecodeRows, n_rows: int, reference: Tensor, full_log_p: list[Tensor] | None
) -> tuple[list[Tensor], list[Outcome]]:
    """Feed the reference to all rows, and compare them with full attention; None if they are full attention."""
    log_ps: list[Tensor] = []
    kl: list[np.ndarray] = []
    agreement: list[np.ndarray] = []
    accuracy: list[np.ndarray] = []
    nll_change: list[np.ndarray] = []
    shares = _Shares()
    for step, token in enumerate(reference):
        done = rows.step(token.expand(n_rows))
        shares.add(done, np.ones(n_rows, dtype=bool))
        log_p = done.logits.to(torch.promote_types(done.logits.dtype, torch.float32)).log_softmax(-1)
        full = log_p[0] if full_log_p is None else full_log_p[step]
        if full_log_p is None:
            log_ps.append(full)
        kl.append((full.exp() * (full - log_p)).sum(-1).clamp(min=0).double().cpu().numpy())
        agreement.append((log_p.argmax(-1) == full.argmax(-1)).cpu().numpy())
        if step + 1 < len(reference):
            following = int(reference[step + 1])
            accuracy.append((log_p.argmax(-1) == following).cpu().numpy())
            nll_change.append((full[following] - log_p[:, following]).double().cpu().numpy())
    outcomes = []
    for row in range(n_rows):
        full_share, read_share = shares.of(row)
        outcomes.append(
            Outcome(
                kl=np.array([one[row] for one in kl]),
                agreement=np.array([one[row] for one in agreement], dtype=bool),
                accuracy=np.array([one[row] for one in accuracy], dtype=bool),
                nll_change=np.array([one[row] for one in nll_change]),
                full_share=full_share,
                read_share=read_share,
            )
        )
    return log_ps, outcomes


def _answers(loaded: LoadedModel, prompt: ReadPrompt, rows: DecodeRows, n_rows: int, task: TaskPrompt) -> list[_Answer]:
    """Let every row write on greedily, as stock `generate` does."""
    ends = _end_tokens(loaded)
    tokens = prompt.logits.argmax(-1).expand(n_rows)
    written: list[np.ndarray] = []
    alive = np.ones(n_rows, dtype=bool)
    shares = _Shares()
    while True:
        fed = tokens.cpu().numpy()
        written.append(fed)
        alive = alive & ~np.isin(fed, ends)
        if len(written) == task.n_new_tokens or not alive.any():
            break
        done = rows.step(tokens)
        shares.add(done, alive)
        tokens = done.logits.argmax(-1)
    found = []
    for row in range(n_rows):
        own = [int(step[row]) for step in written]
        end = next((place for place, token in enumerate(own) if token in ends), len(own))
        text = str(loaded.tokenizer.decode(own[:end]))
        full_share, read_share = shares.of(row)
        found.append(_Answer(text, task.score(text), full_share, read_share))
    return found


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Tokens at which the model's own `generate` stops."""
    config = loaded.model.generation_config
    ends = None if config is None else config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
