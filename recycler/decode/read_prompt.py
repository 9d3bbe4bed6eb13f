"""A prompt that was read once, and from which any number of decodings begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from policies import Selection
from recycler.decode.cache import GrowingTokens, KvLayer
from recycler.decode.first_sets import FirstSets, first_sets_of_layer
from recycler.model.attention_hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.model.prefill import prefill
from recycler.model.shape import check_positions
from recycler.sets.prompt_votes import PromptVotes
from recycler.sets.scores import probabilities


@dataclass(frozen=True)
class PromptLayer:
    """What a layer knows of a prompt, or of several of one length.

    Attributes:
        key: `(prompts, kv_heads, tokens, head_dim)`.
        value: The same shape.
        query: `(prompts, kv_heads, group, head_dim)`, of the last token.
        probabilities: `(prompts, kv_heads, group, tokens)`, its attention.
        votes: Of the same shape, by `Selection.prompt_queries`: attention of several queries, summed.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    probabilities: Tensor
    votes: Mapping[int | None, Tensor]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt as full attention leaves it, or several of one length, from which rows decode in turn.

    Attributes:
        layers: One for each layer of the model.
        logits: `(prompts, vocabulary)`, after the last token.
        n_tokens: Its length.
    """

    layers: tuple[PromptLayer, ...]
    logits: Tensor
    n_tokens: int

    @classmethod
    def side_by_side(cls, prompts: Sequence[ReadPrompt]) -> ReadPrompt:
        """Several prompts of one length: row i decodes from prompt i modulo their number. One is itself."""
        if len(prompts) == 1:
            return prompts[0]
        layers = [
            PromptLayer(
                key=torch.cat([layer.key for layer in of_layer]),
                value=torch.cat([layer.value for layer in of_layer]),
                query=torch.cat([layer.query for layer in of_layer]),
                probabilities=torch.cat([layer.probabilities for layer in of_layer]),
                votes={
                    queries: torch.cat([layer.votes[queries] for layer in of_layer]) for queries in of_layer[0].votes
                },
            )
            for of_layer in zip(*(prompt.layers for prompt in prompts), strict=True)
        ]
        return cls(tuple(layers), torch.cat([prompt.logits for prompt in prompts]), prompts[0].n_tokens)

    def first_sets(self, selection: Selection, n_rows: int) -> FirstSets:
        """Choose the sets from which rows decode.

        Args:
            selection: How; its `prompt_queries` must be among those that were asked for.
            n_rows: How many rows.

        Raises:
            ValueError: If the prompt was not read for these queries.
        """
        queries = selection.prompt_queries
        if queries != 1 and queries not in self.layers[0].votes:
            raise ValueError(f"the prompt was not read for prompt_queries={queries}.")
        chosen = [
            first_sets_of_layer(
                index, selection, layer.query, layer.probabilities, 0, self.n_tokens, layer.votes.get(queries)
            )
            for index, layer in enumerate(self.layers)
        ]
        return FirstSets.of(chosen, np.zeros(1, dtype=np.int64), self.n_tokens, n_rows=n_rows)

    def caches(self, n_rows: int) -> list[KvLayer]:
        """Caches of rows that decode from here; they share the prompts' tokens, and each has its own from there on."""
        return [
            KvLayer(GrowingTokens.after(layer.key, n_rows), GrowingTokens.after(layer.value, n_rows))
            for layer in self.layers
        ]


def read_prompt(
    model: PreTrainedModel,
    tokens: Tensor,
    n_steps: int,
    *,
    prompt_queries: Iterable[int | None] = (1,),
    chunk_tokens: int | None = None,
) -> ReadPrompt:
    """Read a prompt with full attention.

    Args:
        model: A causal language model.
        tokens: int64 `(n_prompt_tokens,)`, at least one token.
        n_steps: Decode steps that are to follow.
        prompt_queries: What the selections of the decodings have as `Selection.prompt_queries`.
        chunk_tokens: Prompt tokens per forward; None for what `prefill` takes.

    Raises:
        ValueError: If prompt and steps are longer than the model's positions or reach a sliding window.
    """
    check_positions(model, len(tokens), n_steps)
    layers: list[PromptLayer] = []
    asked = sorted(set(prompt_queries) - {1}, key=str)
    watching: dict[int, dict[int | None, PromptVotes]] = {}

    def watch(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> dict[int | None, Tensor]:
        votes = watching.setdefault(int(module.layer_idx), {n: PromptVotes(n) for n in asked})  # type: ignore[arg-type]
        grouped = query.unflatten(1, (key.shape[1], -1))
        return {n: voting.see(grouped, key, None, scaling) for n, voting in votes.items()}

    def attention(stock: AttentionFunction, is_last: bool) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            votes = watch(module, query, key, kwargs["scaling"])
            if is_last:
                layer = int(module.layer_idx)  # type: ignore[arg-type]
                refuse_full_window(layer, key.shape[2] + n_steps, kwargs.get("sliding_window"))
                grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
                weights = probabilities(grouped @ key.transpose(-1, -2) * kwargs["scaling"], None)
                layers.append(PromptLayer(key, value, grouped, weights, votes))
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    prompt, last = tokens[None, :-1], tokens[None, -1:]
    cache: DynamicCache | None = None
    with torch.inference_mode():
        if prompt.numel() and asked:
            with attention_replaced(model, lambda stock: attention(stock, False)):
                cache = prefill(model, prompt, chunk_tokens)
        elif prompt.numel():
            cache = prefill(model, prompt, chunk_tokens)
        with attention_replaced(model, lambda stock: attention(stock, True)):
            logits = model(last, past_key_values=cache, use_cache=True).logits[:, -1]
    return ReadPrompt(tuple(layers), logits, len(tokens))
