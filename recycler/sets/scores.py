"""Attention to one number per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from policies import GroupPooling, Selection


def probabilities(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis where `allowed`, in float32 or the precision of the logits if that is higher.

    The logits may be overwritten.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        logits = logits.masked_fill_(~allowed, float("-inf"))
    return logits.softmax(-1)


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
