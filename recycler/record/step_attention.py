"""Attention of all decode steps at once, and what the sets chosen from it would keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies import Selection
from recycler.model.attention_hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.model.prefill import prefill
from recycler.model.shape import model_shape, recycled_layers
from recycler.prompts import Prompt
from recycler.record.aged_sets import AgedSets, age_sets
from recycler.sets.recycled_set import select
from recycler.sets.scores import Scoring, probabilities, token_scores


class StepAttention:
    """Attention of the decode steps over some KV heads of a layer, and what sets chosen at each step would keep.

    Row 0 is the prompt's last token, row i + 1 decode step i.

    Args:
        query: `(heads, group, n_voters - 1 + rows, head_dim)`, those of consecutive places.
        key: `(heads, tokens, head_dim)`.
        first: Place of the first query.
        n_voters: Queries that choose the set of row 0 together; each other row chooses its own.
        scoring: What becomes of query x key.

    Attributes:
        query: `(heads, group, rows, head_dim)`, those of the rows.
        weights: `(heads, group, rows, tokens)`: attention of the rows.
        ends: int64 `(rows, 1)`: tokens that each row sees.
    """

    def __init__(self, query: Tensor, key: Tensor, first: int, n_voters: int, scoring: Scoring) -> None:
        self.query = query[:, :, n_voters - 1 :]
        tokens = key.shape[1]
        ends = first + 1 + torch.arange(query.shape[2], device=query.device)[:, None]
        logits = scoring.logits(query @ key[:, None].transpose(-1, -2))
        # What comes before the first query is visible to all.
        logits[..., first:].masked_fill_(torch.arange(first, tokens, device=query.device) >= ends, float("-inf"))
        weights = probabilities(logits, None)
        del logits
        self._first = first + n_voters - 1
        self.ends = ends[n_voters - 1 :]
        self._votes = weights[:, :, :n_voters].sum(2) if n_voters > 1 else None
        self.weights = weights[:, :, n_voters - 1 :]

    def scores(self, selection: Selection) -> Tensor:
        """By which each row chooses its set, `(heads, rows, tokens)`."""
        scores = token_scores(self.weights.transpose(1, 2), selection)
        if self._votes is not None:
            scores[:, 0] = token_scores(self._votes, selection)
        return scores

    def sets(
        self, selection: Selection, ages: Sequence[int], sizes: Tensor | None, *, apart: int = 1
    ) -> tuple[AgedSets, Tensor]:
        """What becomes of the sets that each row would choose.

        Args:
            selection: How sets are chosen.
            ages: Which ages to look at, rising from 1.
            sizes: int64 `(heads, 1, 1)`: most tokens of each head's sets; None for the selection's k.
            apart: As in `age_sets`.

        Returns:
            The aged sets, and what each new one recovers, `(heads, rows)` in [0, 1].
        """
        chosen = select(self.scores(selection), selection, 0, self.ends, sizes)
        # Sums of parts of a distribution: rounding may leave [0, 1] by an ulp.
        fresh_mass = chosen.recovered_mass(self.weights.transpose(1, 2)).clamp_(0, 1)
        return age_sets(chosen, self.weights, self._first, ages, apart=apart), fresh_mass


Watch = Callable[[int, slice, StepAttention], None]
"""Gets the layer, some of its KV heads, and their attention."""


def watch_steps(
    model: PreTrainedModel, prompt: Prompt, watch: Watch, *, n_voters: int, n_heads: int, chunk_tokens: int | None
) -> Tensor:
    """Run a prompt and its decode steps, which are fed as they are, and show the attention of all steps at once.

    Args:
        model: A causal language model.
        prompt: The text.
        watch: Called for every layer and `n_heads` of its KV heads at a time.
        n_voters: Queries of the prompt that choose the first set.
        n_heads: KV heads at once.
        chunk_tokens: Prompt tokens per forward; None for what `prefill` takes.

    Returns:
        `(steps, vocabulary)`: logits after each step.
    """
    shape, layers = model_shape(model), recycled_layers(model)
    first = prompt.n_prompt_tokens - n_voters

    def watching(stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = layers[int(module.layer_idx)]  # type: ignore[arg-type]
            grouped, scoring = query[0].unflatten(0, (shape.kv_heads, -1)), Scoring.of_call(key, kwargs)
            refuse_full_window(layer, key.shape[2], kwargs.get("sliding_window"))
            for begin in range(0, shape.kv_heads, n_heads):
                heads = slice(begin, begin + n_heads)
                watch(layer, heads, StepAttention(grouped[heads], key[0, heads], first, n_voters, scoring))
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    tokens = torch.as_tensor(prompt.tokens.astype(np.int64), device=model.device)[None]
    cache = prefill(model, tokens[:, :first], chunk_tokens) if first else None
    with torch.inference_mode(), attention_replaced(model, watching):
        logits: Tensor = model(tokens[:, first:], past_key_values=cache, use_cache=True).logits[0, n_voters:]
    return logits
