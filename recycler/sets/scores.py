"""Attention to one number per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from policies import GroupPooling, Selection


@dataclass(frozen=True)
class Scoring:
    """How a layer makes attention of the products of queries and keys.

    Attributes:
        scaling: Factor on them.
        softcap: Logits become `softcap * tanh(logits / softcap)`, as in Gemma 2; None if they stay.
        sink_logits: `(kv_heads, group)`: of a sink that takes part in the softmax and has no value, as in GPT-OSS; None
            without. Probabilities here are those of the tokens, and sum to 1: a sink takes of the output alone.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @classmethod
    def of_call(cls, key: Tensor, arguments: Mapping[str, Any]) -> Scoring:
        """What transformers hands to an attention function.

        Args:
            key: `(rows, kv_heads, tokens, head_dim)`.
            arguments: Its keyword arguments.
        """
        sinks = arguments.get("s_aux")
        return cls(
            float(arguments["scaling"]),
            arguments.get("softcap"),
            None if sinks is None else sinks.view(key.shape[1], -1),
        )

    def logits(self, products: Tensor) -> Tensor:
        """Logits of products of queries and keys, which are overwritten."""
        logits = products.mul_(self.scaling)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def weights(self, probabilities: Tensor, logits: Tensor, kv_heads: Tensor | None = None) -> Tensor:
        """What values are summed with: the probabilities, less what a sink takes of them.

        Args:
            probabilities: `(..., kv_heads, group, tokens)`.
            logits: Of the same shape, -inf at tokens that are not attended to.
            kv_heads: int64 `(n,)`, if both are `(n, group, tokens)`: the head of each.
        """
        if self.sink_logits is None:
            return probabilities
        sinks = self.sink_logits if kv_heads is None else self.sink_logits[kv_heads]
        return probabilities * (logits.logsumexp(-1, keepdim=True) - sinks[..., None]).sigmoid()


def probabilities(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis where `allowed`, in float32 or the precision of the logits if that is higher.

    The logits may be overwritten.
    """
    if allowed is not None:
        logits = masked(logits, allowed)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits, -inf where not `allowed`, in float32 or their precision if that is higher; they may be overwritten."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if allowed is None else logits.masked_fill_(~allowed, float("-inf"))


def group_scores(probabilities: Tensor, group: GroupPooling) -> Tensor:
    """Pool over query heads: `(..., group, tokens)` to `(..., tokens)`.

    LAYER_MEAN pools over the axis before as well, which must be all KV heads of a layer, and repeats the result.
    """
    if group == GroupPooling.MAX:
        return probabilities.amax(-2)
    by_head = probabilities.mean(-2)
    if group == GroupPooling.LAYER_MEAN:
        return by_head.mean(-2, keepdim=True).expand_as(by_head)
    return by_head


def token_scores(probabilities: Tensor, selection: Selection) -> Tensor:
    """One score per token out of the attention of a unit's query heads.

    Args:
        probabilities: `(..., group, tokens)`, attention of each query head, at least 0.
        selection: How to pool over the group and along tokens.

    Returns:
        `(..., tokens)`: score j is the best pooled probability among tokens `j - pool_forward ... j + pool_backward`.
    """
    scores = group_scores(probabilities, selection.group)
    before, after = selection.pool_forward, selection.pool_backward
    if before + after == 0:
        return scores
    rows = pad(scores.reshape(-1, 1, scores.shape[-1]), (before, after))
    return max_pool1d(rows, before + after + 1, stride=1).view_as(scores)
