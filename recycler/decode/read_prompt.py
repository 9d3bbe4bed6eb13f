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
from recycler.decode.passing_layers import PassingLayers
from recycler.model.attention_hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.model.prefill import prefill
from recycler.model.shape import check_positions, n_layers, recycled_layers
from recycler.sets.prompt_votes import PromptVotes
from recycler.sets.scores import Scoring, probabilities


@dataclass(frozen=True)
class PromptLayer:
    """What a layer knows of a prompt, or of several of one length.

    Attributes:
        key: `(prompts, kv_heads, tokens, head_dim)`.
        value: The same shape, but for the head size.
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
        layers: One for each recycled layer of the model.
        logits: `(prompts, vocabulary)`, after the last token.
        n_tokens: Its length.
        passing: What is left of layers that pass through; None if all are recycled.
    """

    layers: tuple[PromptLayer, ...]
    logits: Tensor
    n_tokens: int
    passing: PassingLayers | None

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
        passing = [prompt.passing for prompt in prompts if prompt.passing is not None]
        return cls(
            layers=tuple(layers),
            logits=torch.cat([prompt.logits for prompt in prompts]),
            n_tokens=prompts[0].n_tokens,
            passing=PassingLayers.side_by_side(passing) if passing else None,
        )

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

    def passing_cache(self, n_rows: int) -> DynamicCache | None:
        """What layers that pass through keep for these rows; None if all are recycled."""
        return None if self.passing is None else self.passing.cache(n_rows)


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
    recycled = recycled_layers(model)
    layers: list[PromptLayer] = []
    asked = sorted(set(prompt_queries) - {1}, key=str)
    watching: dict[int, dict[int | None, PromptVotes]] = {}

    def watch(module: nn.Module, query: Tensor, key: Tensor, scoring: Scoring) -> dict[int | None, Tensor]:
        votes = watching.setdefault(int(module.layer_idx), {n: PromptVotes(n) for n in asked})  # type: ignore[arg-type]
        grouped = query.unflatten(1, (key.shape[1], -1))
        return {n: voting.see(grouped, key, None, scoring) for n, voting in votes.items()}

    def attention(stock: AttentionFunction, is_last: bool) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            scoring = Scoring.of_call(key, kwargs)
            votes = watch(module, query, key, scoring)
            if is_last:
                layer = int(module.layer_idx)  # type: ignore[arg-type]
                refuse_full_window(layer, key.shape[2] + n_steps, kwargs.get("sliding_window"))
                grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
                weights = probabilities(scoring.logits(grouped @ key.transpose(-1, -2)), None)
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
            read = model(last, past_key_values=cache, use_cache=True)
    return ReadPrompt(
        layers=tuple(layers),
        logits=read.logits[:, -1],
        n_tokens=len(tokens),
        passing=PassingLayers([read.past_key_values], recycled) if len(recycled) < n_layers(model) else None,
    )
