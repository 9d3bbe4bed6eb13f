"""How far one distribution of the next token is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) of log-probabilities `(..., vocabulary)`, in nats, `(...)`; rounding may leave it below 0.

    NaN where either has one. Tokens that are impossible under `exact` count nothing.
    """
    terms = exact.exp() * (exact - other)
    return terms.masked_fill_(exact == -torch.inf, 0).sum(-1)
