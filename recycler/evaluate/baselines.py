"""The methods to beat, at equal k: what they keep, and when they look again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from policies import (
    AlwaysFull,
    FixedStride,
    GroupPooling,
    LayerCosine,
    ModelShape,
    NeverFull,
    RandomRefresh,
    Ranking,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
    check_fits,
)
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.quest import Quest

STRIDES = (5, 10, 25, 50)
CHECKS_EVERY = (5, 10)
# By hand, for Llama-3.1-8B.
PUBLISHED_THRESHOLD = 0.85
SFI_MAX_AGE = 32
OUR_SET = "_our_set"


def refreshkv_set(k: int) -> Selection:
    """RefreshKV's set (arXiv 2411.05787): maximum over the heads of a group, pooled by 7, no sinks, no window."""
    return Selection(k, sinks=0, window=0, pool_backward=3, pool_forward=3)


def streaming_llm_set(k: int) -> Selection:
    """StreamingLLM's set (arXiv 2309.17453): 4 sinks and the latest tokens."""
    return Selection(k, sinks=4, window=k - 4, pool_backward=0, pool_forward=0)


def snapkv_set(k: int) -> Selection:
    """SnapKV's set (arXiv 2404.14469): attention of an observation window of 32 queries, summed, pooled by 7.

    The window takes at most a quarter of k. Scores of a KV group's heads are averaged: the paper has no groups.
    """
    window = max(1, min(32, k // 4))
    return Selection(
        k,
        sinks=0,
        window=window,
        pool_backward=3,
        pool_forward=3,
        group=GroupPooling.MEAN,
        prompt_queries=window,
    )


def h2o_set(k: int) -> Selection:
    """H2O's set (arXiv 2306.14048): half of it the latest tokens, half those with most attention so far in total."""
    return Selection(
        k,
        sinks=0,
        window=k // 2,
        pool_backward=0,
        pool_forward=0,
        group=GroupPooling.MEAN,
        ranking=Ranking.ACCUMULATED,
        prompt_queries=None,
    )


def tova_set(k: int) -> Selection:
    """TOVA's set (arXiv 2401.06104): the token with least attention of the latest query, mean over a layer, leaves."""
    return Selection(
        k,
        sinks=0,
        window=0,
        pool_backward=0,
        pool_forward=0,
        group=GroupPooling.LAYER_MEAN,
        ranking=Ranking.UPDATED,
    )


@dataclass(frozen=True)
class DynamicSchedule:
    """RefreshKV's dynamic schedule with a threshold that is tuned to the budget (`calibrated_thresholds`).

    Attributes:
        check_every: Steps between two looks at the cosine.
        with_our_set: Whether it runs with our set instead of RefreshKV's.
    """

    check_every: int
    with_our_set: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"refreshkv_qc{self.check_every}_tuned" + (OUR_SET if self.with_our_set else "")

    def method(self, threshold: float, k: int, our_set: Selection | None) -> Scheduled:
        """The method at a threshold; `our_set` is the tuned one, which schedules get pooled."""
        selection = our_set.pooled() if self.with_our_set and our_set is not None else refreshkv_set(k)
        policy = LayerCosine(threshold, self.check_every)
        return Scheduled(self.name, "RefreshKV dynamic, threshold tuned", policy, selection)


def dynamic_schedules(our_set: Selection | None) -> tuple[DynamicSchedule, ...]:
    """Those that there are, with RefreshKV's set and, if there is one, with ours."""
    with_our_set = (False,) if our_set is None else (False, True)
    return tuple(DynamicSchedule(every, ours) for ours in with_our_set for every in CHECKS_EVERY)


def baselines(
    k: int,
    shape: ModelShape,
    budget: float,
    sentence_ends: Sequence[int],
    *,
    our_set: Selection | None = None,
    seed: int = 0,
) -> list[Method]:
    """All methods to compare with that have nothing to tune, by their papers' recipes; schedules again with our set.

    Deviations that all share: the prompt is read with full attention; a set never holds more than k tokens, those that
    arrived since included (SnapKV and TOVA attend to the new token besides); tokens keep their own positions
    (StreamingLLM renumbers them); evicted tokens stay in the cache, unread.

    Args:
        k: Tokens of a set.
        shape: The model's.
        budget: Share of unit-steps that `random` runs full, in [0, 1].
        sentence_ends: Tokens at which SFI looks again.
        our_set: The selection to run the schedules with once more, or None; its k must be `k`, where units have sizes
            of their own (`unit_k`) their mean. Schedules get its pooled form (`Selection.pooled`), which serves them
            better; sizes are of no use to them.
        seed: Of `random`.

    Raises:
        ValueError: If k is too small for a set or no multiple of Quest's pages, or `our_set` has another k or is for
            another model shape.
    """
    if our_set is not None and our_set.k != k:
        raise ValueError(f"methods are compared at equal k: the policy's set has {our_set.k} tokens, not {k}.")
    if our_set is not None:
        check_fits(our_set, shape)
        our_set = our_set.pooled()
    methods: list[Method] = [
        _kept("streaming_llm", "StreamingLLM, arXiv 2309.17453", streaming_llm_set(k)),
        _kept("snapkv", "SnapKV, arXiv 2404.14469", snapkv_set(k)),
        _kept("h2o", "H2O, arXiv 2306.14048", h2o_set(k)),
        _kept("tova", "TOVA, arXiv 2401.06104", tova_set(k)),
        Quest("quest", "Quest, arXiv 2406.10774", k),
    ]
    sets = {"": refreshkv_set(k)} | ({} if our_set is None else {OUR_SET: our_set})
    for suffix, selection in sets.items():
        for name, (source, policy) in schedules(shape, budget, sentence_ends, seed).items():
            methods.append(Scheduled(name + suffix, source, policy, selection))
        never = "never refreshed: the prompt's last query chooses once"
        methods.append(Scheduled("never" + suffix, never, NeverFull(), selection))
        methods.append(fresh_top_k("fresh_top_k" + suffix, "the set of a full step, at every step", selection))
    unpooled = dataclasses.replace(our_set or Selection(k), pool_backward=0, pool_forward=0)
    ceiling = "sinks, window and the best tokens, chosen at every step: the ceiling"
    methods.append(fresh_top_k("fresh_top_k_ceiling", ceiling, unpooled))
    return methods


def fresh_top_k(name: str, source: str, selection: Selection) -> Scheduled:
    """A new set at every step, which no schedule with the same selection can beat but by chance.

    It is no method to run, as it reads all keys at every step; its full share is that of keys-only refreshes.
    """
    return Scheduled(name, source, RefreshKeys(AlwaysFull()), selection)


def schedules(
    shape: ModelShape, budget: float, sentence_ends: Sequence[int], seed: int
) -> dict[str, tuple[str, StepPolicy]]:
    """Source and policy of every schedule that has nothing to tune."""
    found: dict[str, tuple[str, StepPolicy]] = {
        f"refreshkv_s{stride}": ("RefreshKV fixed stride, arXiv 2411.05787", FixedStride(stride)) for stride in STRIDES
    }
    for every in CHECKS_EVERY:
        source = "RefreshKV dynamic, arXiv 2411.05787"
        found[f"refreshkv_qc{every}_published"] = source, LayerCosine(PUBLISHED_THRESHOLD, every)
    found["sfi"] = "SFI, arXiv 2603.12038", SentenceBoundary(tuple(sentence_ends), SFI_MAX_AGE)
    drawn = RandomRefresh.drawn(budget, (shape.layers, shape.kv_heads), seed)
    found["random"] = "full at random, each unit for itself", drawn
    return found


def _kept(name: str, source: str, selection: Selection) -> Scheduled:
    return Scheduled(name, source, NeverFull(), selection)
