"""Closed loop: what policies do to a model's predictions when their errors feed on each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from policies import AlwaysFull, Selection, StepPolicy, check_fits, policy_to_json
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.rows import Rows, decode_rows
from recycler.decode.token_ids import check_tokens, n_vocabulary
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.divergence import kl_divergence
from recycler.model.loading import LoadedModel
from recycler.model.shape import check_positions, model_shape
from recycler.prompts import Prompt
from recycler.record.one_prompt import traced_prompt
from traces import TraceFile


@dataclass(frozen=True)
class Followed:
    """What rows did along a text that was fed to all of them (teacher-forced), beside full attention.

    Attributes:
        kl: float64 `(rows, steps)`, nats, at least 0: KL(full || row) of the next-token distribution.
        agreement: bool `(rows, steps)`: whether both find the same token most likely.
        accuracy: bool `(rows, steps)`: whether the token found most likely is the text's own next token; False at the
            last step, whose next token is not in the text.
        nll_change: float64 `(rows, steps)`, nats: what the row adds to the negative log-likelihood of the next token;
            NaN at the last step.
        full: float64 `(rows, steps, layers, kv_heads)`: decisions, as each counts in the full share: 1 for a full step,
            1/2 for a keys-only refresh, else 0.
        read_share: float64 `(rows, steps)`: tokens read of the cache, as a share of what full attention reads.
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    nll_change: np.ndarray
    full: np.ndarray
    read_share: np.ndarray


def follow(rows: Rows, text: Tensor, full_log_p: Callable[[int, Tensor], Tensor], *, desc: str = "") -> Followed:
    """Feed texts to rows, and compare what they predict with full attention.

    Args:
        rows: At the beginning of the texts.
        text: int64 `(steps,)`, at least one token; or `(texts, steps)`, row i getting text i modulo their number.
        full_log_p: Given the step and the log-probabilities of all rows `(rows, vocabulary)`, those of full attention
            `(vocabulary,)` or `(texts, vocabulary)`.
        desc: What a bar of progress says; none without.
    """
    texts = text.reshape(-1, text.shape[-1])
    n_texts, n_steps = texts.shape
    shape = (rows.n_rows, n_steps)
    kl, nll_change, read_share = np.empty(shape), np.full(shape, np.nan), np.empty(shape)
    agreement, accuracy = np.empty(shape, dtype=bool), np.zeros(shape, dtype=bool)
    full: list[np.ndarray] = []
    with torch.inference_mode():
        for step in tqdm(range(n_steps), desc=desc, unit="step", disable=not desc, leave=False):
            done = rows.step(texts[:, step].repeat(rows.n_rows // n_texts))
            full.append(done.full)
            read_share[:, step] = done.tokens_read.mean((1, 2)) / done.dense_tokens
            log_p = done.logits.to(torch.promote_types(done.logits.dtype, torch.float32)).log_softmax(-1)
            reference = full_log_p(step, log_p).reshape(-1, log_p.shape[-1])
            # `(rows / texts, texts, vocabulary)`: what is said of full attention is computed once for a text.
            by_text = log_p.unflatten(0, (-1, len(reference)))
            kl[:, step] = kl_divergence(reference, by_text).double().flatten().cpu().numpy()
            predicted = log_p.argmax(-1)
            agrees = predicted.unflatten(0, (-1, len(reference))) == reference.argmax(-1)
            agreement[:, step] = agrees.flatten().cpu().numpy()
            if step + 1 < n_steps:
                following = texts[:, step + 1].repeat(rows.n_rows // n_texts)
                accuracy[:, step] = (predicted == following).cpu().numpy()
                of_following = reference.repeat(rows.n_rows // len(reference), 1).gather(-1, following[:, None])
                change = of_following - log_p.gather(-1, following[:, None])
                nll_change[:, step] = change[:, 0].double().cpu().numpy()
    return Followed(kl.clip(min=0), agreement, accuracy, nll_change, np.stack(full, axis=1), read_share)


@dataclass(frozen=True)
class ClosedLoop:
    """What some policies did on one prompt, teacher-forced: every step is fed the text's own token.

    Attributes:
        kl: float64 `(policies, steps)`, nats: divergence of the next-token distribution from that of full attention,
            KL(full || policy).
        agreement: bool `(policies, steps)`: whether both find the same token most likely.
        accuracy: bool `(policies, steps)`: whether the token found most likely is the text's own next token; False at
            the last step, whose next token is not in the text.
        full: float64 `(policies, steps, layers, kv_heads)`: decisions, as each counts in the full share: 1 for a full
            step, 1/2 for a keys-only refresh, else 0.
        read_share: float64 `(policies, steps)`: tokens read of the cache, as a share of what full attention reads.
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray
    read_share: np.ndarray

    @property
    def full_share(self) -> np.ndarray:
        """Full share `(policies,)`."""
        share: np.ndarray = self.full.mean((1, 2, 3))
        return share


def run_closed_loop(
    model: PreTrainedModel,
    tokens: np.ndarray,
    n_prompt_tokens: int,
    policies: Sequence[StepPolicy],
    selection: Selection,
    *,
    chunk_tokens: int | None = None,
    fast: bool = True,
) -> ClosedLoop:
    """Decode a text under several policies at once, one row each, and compare with full attention.

    Rows share the prompt's cache and the reading of the weights. Full attention runs as one more row, so that the
    comparison is with the same arithmetic.

    Args:
        model: A causal language model.
        tokens: int `(n_prompt_tokens + steps,)`.
        n_prompt_tokens: Where decoding begins, at least 1.
        policies: Policies to compare.
        selection: How sets are chosen, by all of them.
        chunk_tokens: Prompt tokens per forward; None for what `prefill` takes.
        fast: False keeps to the plain path where an engine would do.

    Raises:
        ValueError: If a policy or the selection is for another model shape, or the text is longer than the model's
            positions or reaches a sliding window.
    """
    (found,) = run_closed_loops(
        model, [tokens], n_prompt_tokens, policies, selection, chunk_tokens=chunk_tokens, fast=fast
    )
    return found


def run_closed_loops(
    model: PreTrainedModel,
    texts: Sequence[np.ndarray],
    n_prompt_tokens: int,
    policies: Sequence[StepPolicy | Sequence[StepPolicy]],
    selection: Selection,
    *,
    chunk_tokens: int | None = None,
    fast: bool = True,
    desc: str = "",
) -> list[ClosedLoop]:
    """The same for several texts of one length at once, all with all policies.

    Weights are read once for all rows, and with many rows each number that is read is used by many.

    Args:
        model: As above, like what is not said here.
        texts: int `(n_prompt_tokens + steps,)` each.
        n_prompt_tokens: Where decoding begins, at least 1.
        policies: Policies to compare; one that is another for every text is given as a sequence of them.
        selection: How sets are chosen, by all of them.
        chunk_tokens: Prompt tokens per forward.
        fast: False keeps to the plain path.
        desc: What a bar of progress says; none without.

    Returns:
        One for each text.
    """
    n_texts, n_steps = len(texts), len(texts[0]) - n_prompt_tokens
    check_positions(model, n_prompt_tokens, n_steps)
    shape = model_shape(model)
    of_rows = [
        policy
        for of_texts in (AlwaysFull(), *policies)
        for policy in ([of_texts] * n_texts if isinstance(of_texts, StepPolicy) else of_texts)
    ]
    for policy in of_rows:
        check_fits(policy, shape)
    check_fits(selection, shape)
    text = torch.as_tensor(np.stack(texts).astype(np.int64), device=model.device)
    check_tokens(text, n_vocabulary(model))
    queries = (selection.prompt_queries,)
    read = [
        read_prompt(model, tokens[:n_prompt_tokens], n_steps, prompt_queries=queries, chunk_tokens=chunk_tokens)
        for tokens in tqdm(text, desc=f"{desc}: reading", unit="prompt", disable=not desc, leave=False)
    ]
    prompt = ReadPrompt.side_by_side(read)
    del read
    rows = decode_rows(model, prompt, of_rows, selection, fast=fast)
    del prompt
    found = follow(rows, text[:, n_prompt_tokens:], lambda step, log_p: log_p[:n_texts], desc=desc)
    # Full attention is the first policy of every text.
    return [
        ClosedLoop(**{field.name: getattr(found, field.name)[i::n_texts][1:] for field in fields(ClosedLoop)})
        for i in range(n_texts)
    ]


# Rows of a run: beyond, a matrix product gains little, and a step's logits take 20 MB more for every 100.
_ROWS_AT_ONCE = 96


@dataclass(frozen=True)
class ClosedLoopStore:
    """Closed loops kept in a folder; see `Store`.

    Attributes:
        folder: Made when the first result is kept.
    """

    folder: Path

    def run(
        self,
        loaded: LoadedModel,
        trace: TraceFile,
        policies: Sequence[StepPolicy],
        selection: Selection | None = None,
    ) -> ClosedLoop:
        """Run policies on the prompt of a trace, or read the result of an equal run.

        Args:
            loaded: The model of the trace.
            trace: Its prompt and continuation are used.
            policies: Rows of the batch.
            selection: How sets are chosen; None for as in the trace.
        """
        chosen = selection or Selection(**trace.header.selection)
        (found,) = self.run_all(loaded, [traced_prompt(trace)], policies, chosen)
        return found

    def run_all(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        policies: Sequence[StepPolicy],
        selection: Selection,
        *,
        desc: str = "",
    ) -> list[ClosedLoop]:
        """The same for several prompts.

        Prompts of one length are run together, as many as make some hundred rows, and kept together.

        Args:
            loaded: The model.
            prompts: In any order.
            policies: Run on every prompt.
            selection: How sets are chosen.
            desc: What bars of progress say; none without.

        Returns:
            One for each prompt.
        """
        at_once = max(1, _ROWS_AT_ONCE // (len(policies) + 1))
        found: list[ClosedLoop] = []
        for (n_prompt_tokens, _), alike in itertools.groupby(prompts, key=_n_tokens):
            texts = [prompt.tokens for prompt in alike]
            for begin in range(0, len(texts), at_once):
                some = texts[begin : begin + at_once]
                depends_on = {
                    "closed loops of": [digest_of_tokens(tokens) for tokens in some],
                    "n_prompt_tokens": n_prompt_tokens,
                    "selection": selection.to_json(),
                    "policies": [policy_to_json(policy) for policy in policies],
                }
                how = (n_prompt_tokens, policies, selection)
                said = f"{desc}, {len(found)} of {len(prompts)} prompts done" if desc else ""
                compute = partial(_arrays_of_loops, loaded.model, some, *how, desc=said)
                arrays = Store(self.folder).get(loaded, depends_on, compute)
                found += [ClosedLoop(**{name: array[i] for name, array in arrays.items()}) for i in range(len(some))]
        return found


def _arrays_of_loops(*arguments: Any, desc: str) -> dict[str, np.ndarray]:
    """What `run_closed_loops` finds, all texts in one array."""
    loops = run_closed_loops(*arguments, desc=desc)
    return {field.name: np.stack([getattr(loop, field.name) for loop in loops]) for field in fields(ClosedLoop)}


def _n_tokens(prompt: Prompt) -> tuple[int, int]:
    """Of a prompt and of its continuation."""
    return prompt.n_prompt_tokens, prompt.n_steps
