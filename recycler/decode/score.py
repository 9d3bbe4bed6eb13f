"""How likely a policy's decoding finds a text that is given: teacher-forced, token by token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import PolicyFile, Selection, StepPolicy
from recycler.decode.asked import Asked, model_of
from recycler.decode.counts import dense_tokens
from recycler.decode.engines import begin_decoding
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.receipt import Receipt
from recycler.decode.rows import Rows
from recycler.decode.tally import Tally
from recycler.decode.token_ids import check_tokens, n_vocabulary
from recycler.model.shape import max_positions, model_shape

# Token ids in order.
Tokens = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Scored:
    """A continuation of n tokens as decoding saw it come.

    Attributes:
        log_probabilities: float64 `(n,)`, nats: of each token, given the context and the tokens before it.
        is_greedy: bool `(n,)`: whether it was the most likely one.
        receipt: Of the n - 1 decode steps: the first token is predicted by the context.
    """

    log_probabilities: np.ndarray
    is_greedy: np.ndarray
    receipt: Receipt

    def __post_init__(self) -> None:
        if self.log_probabilities.ndim != 1 or self.log_probabilities.shape != self.is_greedy.shape:
            raise ValueError(
                "log_probabilities and is_greedy must be (n,), one for each token, not "
                f"{self.log_probabilities.shape} and {self.is_greedy.shape}."
            )


def score(
    target: Any,
    policy: StepPolicy | PolicyFile | str | Path,
    context_tokens: Tokens,
    continuation_tokens: Tokens,
    selection: Selection | None = None,
    *,
    fast: bool = True,
    horizon_steps: int | None = None,
) -> Scored:
    """Score a continuation as a policy's decoding finds it.

    The context is read with full attention. Then the continuation's tokens are fed one by one, each as a decode step
    under the policy, so that errors feed on each other as they do in generation.

    Args:
        target: As in `recycled`.
        policy: As there.
        context_tokens: int `(tokens,)`, at least one.
        continuation_tokens: int `(n,)`, at least one.
        selection: As in `recycled`, like what follows.
        fast: As there.
        horizon_steps: As there.

    Raises:
        ValueError: As `recycled` does, if there is no context or no continuation, a token is none of the model's, both
            together are longer than the model's positions or reach a sliding window, or the model is recycled in this
            thread already.
    """
    (scored,) = score_each(
        target, policy, context_tokens, [continuation_tokens], selection, fast=fast, horizon_steps=horizon_steps
    )
    return scored


def score_each(
    target: Any,
    policy: StepPolicy | PolicyFile | str | Path,
    context_tokens: Tokens,
    continuations: Sequence[Tokens],
    selection: Selection | None = None,
    *,
    fast: bool = True,
    horizon_steps: int | None = None,
) -> list[Scored]:
    """The same for several continuations of one context, which is read once; each decodes as if it were alone.

    Args:
        target: As in `score`, like what is not said here.
        policy: As there.
        context_tokens: As there.
        continuations: int `(n,)` each, of any lengths.
        selection: As there.
        fast: As there.
        horizon_steps: As there.

    Returns:
        One for each continuation.
    """
    model = model_of(target)
    asked = Asked.of(policy, selection, horizon_steps, model)
    context = _checked("context", context_tokens, model)
    texts = [_checked("continuation", continuation, model) for continuation in continuations]
    if not texts:
        return []
    # The last token of a continuation is predicted and not fed.
    most_steps = max(map(len, texts)) - 1
    prompt = read_prompt(model, context, most_steps, prompt_queries=(asked.selection.prompt_queries,))
    scored = [_decoded(model, prompt, asked, text, fast) for text in texts]
    for sentence in dict.fromkeys((*asked.notes, *(one.receipt.beyond_horizon for one in scored))):
        if sentence:
            warnings.warn(sentence, stacklevel=2)
    return scored


def _checked(name: str, tokens: Tokens, model: PreTrainedModel) -> Tensor:
    """int64 `(tokens,)` on the model's device."""
    found = torch.as_tensor(tokens, device=model.device)
    if found.dim() != 1 or not len(found):
        raise ValueError(f"the {name} must be one row of at least one token, not of shape {tuple(found.shape)}.")
    if found.is_floating_point():
        raise ValueError(f"the {name} must be token ids, which are whole numbers, not {found.dtype}.")
    check_tokens(found, n_vocabulary(model))
    return found.long()


def _decoded(model: PreTrainedModel, prompt: ReadPrompt, asked: Asked, text: Tensor, fast: bool) -> Scored:
    tally, why_plain = Tally(model_shape(model).units), ""
    logits = prompt.logits
    n_steps = len(text) - 1
    if n_steps:
        with torch.inference_mode():
            first = prompt.first_sets(asked.selection.within(max_positions(model)), 1)
            layers, passing = prompt.caches(1), prompt.passing_cache(1)
            begun = begin_decoding(model, layers, first, asked.policy, passing=passing, fast=fast)
        rows = Rows(begun.decoding, 1, prompt.n_tokens)
    of_tokens, is_greedy = [], []
    for place, token in enumerate(text):
        log_p = logits[0].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        of_tokens.append(float(log_p[token]))
        is_greedy.append(bool(log_p.argmax() == token))
        if place < n_steps:
            logits = rows.step(token[None]).logits
    if n_steps:
        why_plain = begun.why_plain
        read = dense_tokens(np.zeros(1, dtype=np.int64), prompt.n_tokens, n_steps)
        tally.add_run(begun.engine, n_steps, read, begun.decoding.totals())
    return Scored(np.array(of_tokens), np.array(is_greedy), tally.receipt(why_plain, asked.horizon_steps, asked.notes))
