"""Quest: pages of the cache, chosen at every step by a bound on their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows
from recycler.evaluate.chosen import Chosen, begin_choosing
from recycler.evaluate.method import Method


@dataclass(frozen=True)
class Quest(Method):
    """The pages whose keys could score highest, for each query head.

    Source: Quest (arXiv 2406.10774): of each page the smallest and the largest value of every key channel are kept;
    their products with the query bound the scores of all its keys from above; the `k / page_tokens` pages with the
    highest bounds are attended to. The first two layers attend to everything, as in the paper. The paper has no groups
    of query heads; here each head of a group chooses its own pages, and a page that any of them wants is read once.

    Attributes:
        k: Tokens that each query head attends to; a multiple of `page_tokens`.
        page_tokens: Tokens of a page.
        dense_layers: First layers that attend to everything.
    """

    k: int
    page_tokens: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.k < self.page_tokens or self.k % self.page_tokens:
            raise ValueError(
                f"Quest attends to whole pages: k must be a multiple of {self.page_tokens} tokens, not {self.k}."
            )

    @property
    def prompt_queries(self) -> int | None:
        return 1

    def settings(self) -> dict[str, Any]:
        return {
            "quest": {"k": self.k, "page_tokens": self.page_tokens, "dense_layers": self.dense_layers},
        }

    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        return begin_choosing(model, prompt, lambda layer, query, key, logits: self.choose(layer, query, key))

    def choose(self, layer: int, query: Tensor, key: Tensor) -> Chosen:
        """Choose for one layer.

        Args:
            layer: Index of the layer.
            query: `(..., kv_heads, group, head_dim)`.
            key: `(..., kv_heads, tokens, head_dim)`, the whole cache, the newest token last.
        """
        tokens = key.shape[-2]
        if layer < self.dense_layers or tokens <= self.k:
            allowed = torch.ones((*query.shape[:-1], tokens), dtype=torch.bool, device=key.device)
            return Chosen(allowed, allowed[..., 0, :].sum(-1).double())
        bound = self.page_bounds(query, key)
        pages = torch.zeros_like(bound, dtype=torch.bool)
        pages.scatter_(-1, bound.topk(self.k // self.page_tokens).indices, True)
        allowed = pages.repeat_interleave(self.page_tokens, dim=-1)[..., :tokens]
        # Two bounds for each page are as much as the key and the value of one token.
        read = allowed.any(-2).sum(-1).double() + pages.shape[-1]
        return Chosen(allowed, read)

    def page_bounds(self, query: Tensor, key: Tensor) -> Tensor:
        """Upper bound of query x key in each page, `(..., kv_heads, group, pages)`."""
        missing = -key.shape[-2] % self.page_tokens
        filled = torch.cat([key, key[..., -1:, :].expand(*key.shape[:-2], missing, -1)], dim=-2)
        pages = filled.unflatten(-2, (-1, self.page_tokens))
        low, high = pages.amin(-2), pages.amax(-2)
        bound: Tensor = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
        return bound
