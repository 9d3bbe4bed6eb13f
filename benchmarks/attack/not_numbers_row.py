"""NaN and infinities in one row of a batch."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from policies import BudgetConstrained, CosineThreshold, FixedStride, Ranking, RefreshKeys, Selection
from recycler.decode.recycled import recycled

_POLICIES = (FixedStride(3), BudgetConstrained(CosineThreshold(0.8), 0.4, 1), RefreshKeys(FixedStride(2)))
_SELECTIONS = (Selection(20, 2, 8), Selection(20, 2, 8, 0, 0, ranking=Ranking.DECAYED, prompt_queries=8))
_ROUNDING = 1e-10
# Its embedding is what the case makes of it.
_BAD = 255


class NotNumbers(Row):
    """A row reads a token whose embedding is no number: the others write what they write beside a good one.

    In float64: where a bad row runs full and a good one would not, sums of the others are made in another order.
    """

    name: ClassVar[str] = "NaN and infinities in one row of a batch of 4"
    n: ClassVar[int] = 500

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        warnings.simplefilter("ignore")
        self._model = tiny_model().double()
        self._good = self._model.get_input_embeddings().weight.data[_BAD].clone()  # type: ignore[operator, union-attr]
        self._tokens = torch.randint(1, 200, (4, 48), generator=torch.Generator().manual_seed(1))

    def case(self, rng: random.Random) -> str | None:
        policy, selection = rng.choice(_POLICIES), rng.choice(_SELECTIONS)
        fast, row, place = rng.random() < 0.5, rng.randrange(4), rng.choice((rng.randrange(40), rng.randrange(40, 47)))
        value = rng.choice((float("nan"), float("inf"), float("-inf"), 3e38))
        tokens = self._tokens.clone()
        tokens[row, place] = _BAD
        told = f"{value} in row {row} at {place}, {policy.kind}, fast={fast}"
        expected = self._logits(tokens, policy, selection, fast, self._good)
        try:
            found = self._logits(tokens, policy, selection, fast, torch.full_like(self._good, value))
        except Exception as error:
            return f"{told}: {type(error).__name__}: {error}"
        others = [other for other in range(4) if other != row]
        if not torch.allclose(found[:, others], expected[:, others], rtol=0, atol=_ROUNDING):
            return f"{told}: other rows changed by {float((found - expected)[:, others].abs().max()):g}"
        return None

    def _logits(self, tokens: torch.Tensor, policy, selection, fast, bad: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        self._model.get_input_embeddings().weight.data[_BAD] = bad  # type: ignore[operator, union-attr]
        steps = []
        with torch.no_grad(), recycled(self._model, policy, selection, fast=fast):
            cache = self._model(tokens[:, :40], use_cache=True).past_key_values
            for place in range(40, 48):
                given = {"past_key_values": cache, "use_cache": True}
                steps.append(self._model(tokens[:, place : place + 1], **given).logits[:, -1])
        return torch.stack(steps)
