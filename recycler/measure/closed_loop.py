"""Closed loop: what policies do to a model's predictions when their errors feed on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from policies import AlwaysFull, Selection, StepPolicy, check_fits
from recycler.decode.read_prompt import read_prompt
from recycler.decode.rows import decode_rows
from recycler.model.shape import check_positions, model_shape


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
    rows = (AlwaysFull(), *policies)
    text = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=model.device)
    full = np.empty((len(rows), n_steps, *shape.units))
    kl = np.empty((len(rows), n_steps))
    predicted = np.empty((len(rows), n_steps), dtype=np.int64)

    for policy in policies:
        check_fits(policy, shape)
    check_fits(selection, shape)
    queries = (selection.prompt_queries,)
    prompt = read_prompt(model, text[:n_prompt_tokens], n_steps, prompt_queries=queries, chunk_tokens=chunk_tokens)
    decoding = decode_rows(model, prompt, rows, selection, fast=fast)
    del prompt
    with torch.inference_mode():
        for step in range(n_steps):
            done = decoding.step(text[n_prompt_tokens + step].expand(len(rows)))
            full[:, step] = done.full
            logits = done.logits
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            kl[:, step] = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1).double().cpu().numpy()
            predicted[:, step] = log_p.argmax(-1).cpu().numpy()
    right = np.zeros_like(predicted, dtype=bool)
    right[:, :-1] = predicted[:, :-1] == np.asarray(tokens[n_prompt_tokens + 1 :])
    return ClosedLoop(kl=kl[1:].clip(min=0), agreement=predicted[1:] == predicted[0], accuracy=right[1:], full=full[1:])
