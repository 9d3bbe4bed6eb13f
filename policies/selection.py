"""How the recycled set is chosen: settings only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GroupPooling(StrEnum):
    """How the scores of the query heads of a KV group become one score per token."""

    MAX = "max"
    MEAN = "mean"


class Ranking(StrEnum):
    """What decides which token leaves when a new one enters a full set.

    LAST_FULL ranks by the scores of the unit's last full step (RefreshKV); tokens that arrived since have none and
    stay. UPDATED ranks by the attention of the latest step over the set, recycled steps included (Recycled Attention).
    """

    LAST_FULL = "last_full"
    UPDATED = "updated"


@dataclass(frozen=True)
class Selection:
    """Settings of the recycled set of a unit.

    Source: Recycled Attention and RefreshKV (arXiv 2411.05787): attention probabilities of the last query, maximum over
    the query heads of a group, max-pooled along tokens, top k. Sinks and a window (arXiv 2309.17453) are an addition:
    `Selection(k, sinks=0, window=0, pool_backward=3, pool_forward=3)` is the paper's kernel of 7.

    Attributes:
        k: Most tokens that a set ever holds, sinks, window and new tokens included.
        sinks: First tokens of the row, always kept.
        window: Last tokens, the current one included, always kept.
        pool_backward: A token is taken for the best score among itself and tokens up to this many places after it:
            tokens before an attended one come along.
        pool_forward: The same for places before it: tokens after an attended one come along.
        group: How the query heads of a group are pooled.
        ranking: What decides which token leaves a full set.
    """

    k: int
    sinks: int = 4
    window: int = 32
    pool_backward: int = 0
    pool_forward: int = 6
    group: GroupPooling = GroupPooling.MAX
    ranking: Ranking = Ranking.LAST_FULL

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", GroupPooling(self.group))
        object.__setattr__(self, "ranking", Ranking(self.ranking))
        for name in ("k", "sinks", "window", "pool_backward", "pool_forward"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number of tokens, 0 or more, not {value!r}.")
        if self.k < self.sinks + max(self.window, 1):
            raise ValueError(
                f"k must hold the sinks and the window: k is {self.k}, but sinks and window need "
                f"{self.sinks} + {max(self.window, 1)} = {self.sinks + max(self.window, 1)} tokens."
            )
