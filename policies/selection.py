"""How the recycled set is chosen: settings only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from policies.per_unit import as_per_unit, numbers, unit_shape
from policies.shown import shown

# More than any context has. A set larger than its context is the whole context.
MOST_TOKENS = 2**30


class GroupPooling(StrEnum):
    """How the scores of query heads become one score per token.

    MAX and MEAN pool over the query heads of a KV group. LAYER_MEAN takes the mean over all query heads of a layer, so
    that all its units hold the same tokens (TOVA, arXiv 2401.06104); units of a layer must then run full together.
    """

    MAX = "max"
    MEAN = "mean"
    LAYER_MEAN = "layer_mean"


class Ranking(StrEnum):
    """What decides which token leaves when a new one enters a full set.

    LAST_FULL ranks by the scores of the unit's last full step (RefreshKV); tokens that arrived since have none and
    stay. UPDATED ranks by the attention of the latest step over the set, recycled steps included (Recycled Attention).
    ACCUMULATED adds the attention of every step over the set to the scores that the set was chosen by (H2O, arXiv
    2306.14048); a token that arrives begins at 0. DECAYED is between the two: of the score that a token has,
    `Selection.score_decay` is left when the attention of the next step is added.
    """

    LAST_FULL = "last_full"
    UPDATED = "updated"
    ACCUMULATED = "accumulated"
    DECAYED = "decayed"


@dataclass(frozen=True)
class Selection:
    """Settings of the recycled set of a unit.

    Source: Recycled Attention and RefreshKV (arXiv 2411.05787): attention probabilities of the last query, maximum over
    the query heads of a group, max-pooled along tokens, top k. Sinks and a window (arXiv 2309.17453) are an addition:
    `Selection(k, sinks=0, window=0, pool_backward=3, pool_forward=3)` is the paper's kernel of 7.

    Attributes:
        k: Most tokens that a set ever holds, sinks, window and new tokens included; with `unit_k`, the most on average.
        sinks: First tokens of the row, always kept.
        window: Last tokens, the current one included, always kept.
        pool_backward: A token is taken for the best score among itself and tokens up to this many places after it:
            tokens before an attended one come along.
        pool_forward: The same for places before it: tokens after an attended one come along.
        group: How query heads are pooled.
        ranking: What decides which token leaves a full set.
        prompt_queries: Last queries of the prompt whose attention, summed, chooses the first set (SnapKV's observation
            window, arXiv 2404.14469); None for all of them (H2O). Full steps always choose by their own query.
        unit_k: Most tokens of each unit's set, `(layers, kv_heads)`, with mean at most `k`; None gives every unit `k`.
        score_decay: With ranking `decayed`, what is left of a token's score after a step, in [0, 1]; else of no effect.
    """

    k: int
    sinks: int = 4
    window: int = 32
    pool_backward: int = 0
    pool_forward: int = 6
    group: GroupPooling = GroupPooling.MAX
    ranking: Ranking = Ranking.LAST_FULL
    prompt_queries: int | None = 1
    unit_k: Sequence[Sequence[int]] | None = None
    score_decay: float = 0.8

    @classmethod
    def unpooled(cls, k: int) -> Selection:
        """The set for schedules that treat each unit by itself, which tuning records by default.

        Pooling along tokens keeps an aging set useful, and crowds a fresh one with tokens that nobody looks at. Under
        one clock for all units every set ages, so `Selection(k)` pools. Divided by what it is worth, a budget
        refreshes the few units whose attention moves nearly at every step and most others never: the former need no
        pooling, and the latter live on the first set, which the prompt's last 32 queries therefore choose together
        (SnapKV's observation window, arXiv 2404.14469). So that it serves for as long as an output may be, tokens
        leave by the attention of the latest steps: ranked by the last full step, all that a set chose has left it after
        k steps, and what remains is a sliding window.
        """
        return cls(k, pool_forward=0, prompt_queries=32, ranking=Ranking.DECAYED)

    def pooled(self) -> Selection:
        """The same with the default pooling and sizes, which serve clocks better; itself if it pools already."""
        if self.pool_backward or self.pool_forward:
            return self
        return replace(self, pool_backward=Selection.pool_backward, pool_forward=Selection.pool_forward, unit_k=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", GroupPooling(self.group))
        object.__setattr__(self, "ranking", Ranking(self.ranking))
        for name in ("k", "sinks", "window", "pool_backward", "pool_forward"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number of tokens, 0 or more, not {shown(value)}.")
            if value > MOST_TOKENS:
                raise ValueError(f"{name} must be at most {MOST_TOKENS:,} tokens, not {shown(value)}.")
        n_queries = self.prompt_queries
        if n_queries is not None and (not isinstance(n_queries, int) or isinstance(n_queries, bool) or n_queries < 1):
            raise ValueError(
                f"prompt_queries must be a whole number, 1 or more, or none for all, not {shown(n_queries)}."
            )
        if n_queries is not None and n_queries > MOST_TOKENS:
            raise ValueError(f"prompt_queries must be at most {MOST_TOKENS:,} tokens, not {shown(n_queries)}.")
        if self.k < self.sinks + max(self.window, 1):
            raise ValueError(
                f"k must hold the sinks and the window: k is {self.k}, but sinks and window need "
                f"{self.sinks} + {max(self.window, 1)} = {self.sinks + max(self.window, 1)} tokens."
            )
        decay = self.score_decay
        if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay <= 1:
            raise ValueError(
                f"score_decay must be the share of a score that is left after a step, 0 to 1, not {shown(decay)}."
            )
        if self.unit_k is not None:
            sizes = as_per_unit("unit_k", self.unit_k, self.sinks + max(self.window, 1), float("inf"))
            broken = [size for size in numbers(sizes) if isinstance(sizes, (int, float)) or size != int(size)]
            if isinstance(sizes, (int, float)) or broken:
                raise ValueError(
                    "unit_k must be a table of whole numbers with one row per layer and one column per KV head, "
                    f"not {broken[0]:g}."
                )
            object.__setattr__(self, "unit_k", tuple(tuple(int(size) for size in row) for row in sizes))
            if (mean := float(np.mean(self.unit_k))) > self.k:
                raise ValueError(f"unit_k must have a mean of at most k, and {mean:.10g} is above {self.k}.")
            uneven = [row for row in self.unit_k if len(set(row)) > 1]
            if self.group == GroupPooling.LAYER_MEAN and uneven:
                raise ValueError(
                    "with group 'layer_mean' all KV heads of a layer hold the same tokens, so each row of unit_k must "
                    f"be one number repeated, not {uneven[0]}."
                )

    @property
    def score_kept(self) -> float | None:
        """Share of its score that a token keeps from step to step; None where scores stay as a set was chosen by."""
        match self.ranking:
            case Ranking.LAST_FULL:
                return None
            case Ranking.UPDATED:
                return 0.0
            case Ranking.ACCUMULATED:
                return 1.0
            case Ranking.DECAYED:
                return float(self.score_decay)

    @property
    def widest(self) -> int:
        """Tokens of the largest set."""
        return self.k if self.unit_k is None else max(map(max, self.unit_k))

    def unit_shapes(self) -> frozenset[tuple[int, int]]:
        """The `(layers, kv_heads)` of `unit_k`; empty if the selection fits every model."""
        shape = unit_shape(self.unit_k)
        return frozenset() if shape is None else frozenset({shape})

    def at_k(self, k: int) -> Selection:
        """The same with another k, and sizes of units in the same proportion to it as far as sinks and window allow.

        Raises:
            ValueError: If k has no room for sinks and window.
        """
        if self.unit_k is None:
            return replace(self, k=k)
        least = self.sinks + max(self.window, 1)
        sizes = [[max(size * k // self.k, least) for size in row] for row in self.unit_k]
        # Units at the least size may take the mean above k: the largest give some of theirs.
        for _ in range(max(int(np.sum(sizes)) - k * int(np.size(sizes)), 0)):
            row = max(range(len(sizes)), key=lambda row: max(sizes[row]))
            sizes[row][sizes[row].index(max(sizes[row]))] -= 1
        return replace(self, k=k, unit_k=sizes)

    def within(self, n_tokens: int) -> Selection:
        """The same for contexts of at most `n_tokens`, with no number far beyond them: sets take memory by their k."""
        sinks, window = min(self.sinks, n_tokens), min(self.window, n_tokens)
        most = n_tokens + sinks + window + 1
        return replace(
            self,
            k=min(self.k, most),
            sinks=sinks,
            window=window,
            pool_backward=min(self.pool_backward, n_tokens),
            pool_forward=min(self.pool_forward, n_tokens),
            unit_k=self.unit_k and [[min(size, most) for size in row] for row in self.unit_k],
        )

    @classmethod
    def from_json(cls, values: Any) -> Selection:
        """What `to_json` gave; what has a default may be left out.

        Raises:
            ValueError: If they are no fields of a selection, or it refuses them.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or "k" not in values:
            raise ValueError(f"a selection is an object with a k, not {shown(values)}.")
        for name in values:
            if name not in known:
                raise ValueError(f"a selection has no field {shown(name)}: its fields are {', '.join(known)}.")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain JSON values; `Selection(**values)` is the same again."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values
