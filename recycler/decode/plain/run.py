"""Decode steps of a model's own forward, with its attention on the plain path."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from policies import StepPolicy
from recycler.decode.cache_watch import CacheWatch
from recycler.decode.counts import dense_tokens
from recycler.decode.first_sets import FirstSets
from recycler.decode.plain.attention import GatheredSets, UnitAttention
from recycler.decode.plain.step import PlainUnits
from recycler.decode.tally import Tally
from recycler.sets.scores import Scoring


class PlainRun:
    """The decode steps after one prompt.

    Args:
        first: What the prompt left behind.
        policy: Who decides.
        watches: Of each layer's cache, as the prompt left it.
    """

    def __init__(self, first: FirstSets, policy: StepPolicy, watches: Mapping[int, CacheWatch]) -> None:
        self._first, self._watches = first, watches
        self._units = PlainUnits(first, policy)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        scoring: Scoring,
        token: Tensor | None,
    ) -> UnitAttention:
        """Take a step with one layer; where all of its units are full, the output is left to the caller.

        Args:
            layer: Index of the layer.
            query: `(rows, query_heads, 1, head_dim)`.
            key: `(rows, kv_heads, tokens, head_dim)`, the whole cache, this step's token included.
            value: The same shape, but for the head size.
            visible: bool `(rows, tokens)`, False at padding; None if there is none.
            scoring: What becomes of query x key.
            token: `(rows, 1)`, ids of the tokens that are fed; None if they are not known.

        Raises:
            ValueError: If the cache did anything but grow by this token, or the padding changed.
        """
        self._watches[layer].follow(key, visible)
        grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
        attention = GatheredSets(grouped, key, value, visible, scoring, whole_elsewhere=True)
        return self._units.attend(layer, grouped, attention, token)

    def run_full(self, rows: Tensor) -> None:
        """Run rows, bool `(rows,)`, full from the next step on."""
        self._units.run_full(rows)

    def add_to(self, tally: Tally) -> None:
        """Tell what was done so far."""
        if n_steps := self._units.n_steps:
            read = dense_tokens(self._first.start, self._first.end, n_steps)
            tally.add_run("plain", n_steps, read, self._units.totals())
