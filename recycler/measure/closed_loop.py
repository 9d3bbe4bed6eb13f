"""Closed loop: what policies do to a model's predictions when their errors feed on each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import AlwaysFull, Selection, StepPolicy, check_fits, policy_to_json
from recycler.decode.read_prompt import read_prompt
from recycler.decode.rows import Rows, decode_rows
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.loading import LoadedModel
from recycler.model.shape import check_positions, model_shape
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


def follow(rows: Rows, text: Tensor, full_log_p: Callable[[int, Tensor], Tensor]) -> Followed:
    """Feed a text to all rows, and compare what they predict with full attention.

    Args:
        rows: At the beginning of the text.
        text: int64 `(steps,)`, at least one token.
        full_log_p: Given the step and the log-probabilities of all rows `(rows, vocabulary)`, those of full attention
            `(vocabulary,)`.
    """
    n_steps, shape = len(text), (rows.n_rows, len(text))
    following = text.cpu().numpy()
    kl, nll_change, read_share = np.empty(shape), np.full(shape, np.nan), np.empty(shape)
    agreement, accuracy = np.empty(shape, dtype=bool), np.zeros(shape, dtype=bool)
    full: list[np.ndarray] = []
    with torch.inference_mode():
        for step, token in enumerate(text):
            done = rows.step(token.expand(rows.n_rows))
            full.append(done.full)
            read_share[:, step] = done.tokens_read.mean((1, 2)) / done.dense_tokens
            log_p = done.logits.to(torch.promote_types(done.logits.dtype, torch.float32)).log_softmax(-1)
            reference = full_log_p(step, log_p)
            kl[:, step] = (reference.exp() * (reference - log_p)).sum(-1).double().cpu().numpy()
            predicted = log_p.argmax(-1)
            agreement[:, step] = (predicted == reference.argmax(-1)).cpu().numpy()
            if step + 1 < n_steps:
                next_token = int(following[step + 1])
                accuracy[:, step] = (predicted == next_token).cpu().numpy()
                nll_change[:, step] = (reference[next_token] - log_p[:, next_token]).double().cpu().numpy()
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
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray

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
    n_steps = len(tokens) - n_prompt_tokens
    check_positions(model, n_prompt_tokens, n_steps)
    shape = model_shape(model)
    for policy in policies:
        check_fits(policy, shape)
    check_fits(selection, shape)
    text = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=model.device)
    queries = (selection.prompt_queries,)
    prompt = read_prompt(model, text[:n_prompt_tokens], n_steps, prompt_queries=queries, chunk_tokens=chunk_tokens)
    rows = decode_rows(model, prompt, (AlwaysFull(), *policies), selection, fast=fast)
    del prompt
    found = follow(rows, text[n_prompt_tokens:], lambda step, log_p: log_p[0])
    return ClosedLoop(found.kl[1:], found.agreement[1:], found.accuracy[1:], found.full[1:])


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
        tokens = trace.array("tokens")
        n_prompt_tokens = int(trace.header.prompt["n_prompt_tokens"])
        depends_on = {
            "closed loop of": digest_of_tokens(tokens),
            "n_prompt_tokens": n_prompt_tokens,
            "selection": chosen.to_json(),
            "policies": [policy_to_json(policy) for policy in policies],
        }

        def compute() -> dict[str, np.ndarray]:
            found = run_closed_loop(loaded.model, tokens, n_prompt_tokens, policies, chosen)
            return {field.name: getattr(found, field.name) for field in fields(found)}

        return ClosedLoop(**Store(self.folder).get(loaded, depends_on, compute))
