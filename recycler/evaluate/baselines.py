"""The methods to beat, at equal k: what they keep, and when they look again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from policies import (
    FixedStride,
    GroupPooling,
    LayerCosine,
    ModelShape,
    NeverFull,
    RandomRefresh,
    Ranking,
    Selection,
    SentenceBoundary,
    StepPolicy,
    check_fits,
)
from recycler.evaluate.fresh_top_k import FreshTopK
from recycler.evaluate.method import EveryStep, Method, Scheduled
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


def baselines(
    k: int,
    shape: ModelShape,
    budget: float,
    sentence_ends: Sequence[int],
    *,
    thresholds: Mapping[str, float] | None = None,
    our_set: Selection | None = None,
    seed: int = 0,
) -> list[Method]:
    """All methods to compare with, each with its paper's recipe, and the schedules again with our set.

    Deviations that all share: the prompt is read with full attention; a set never holds more than k tokens, those that
    arrived since included (SnapKV and TOVA attend to the new token besides); tokens keep their own positions
    (StreamingLLM renumbers them); evicted tokens stay in the cache, unread.

    Args:
        k: Tokens of a set.
        shape: The model's.
        budget: Share of unit-steps that `random` runs full, in [0, 1].
        sentence_ends: Tokens at which SFI looks again.
        thresholds: By name, cosine thresholds of the dynamic schedules that were tuned to the budget
            (`calibrated_thresholds`); None leaves these schedules out.
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
        EveryStep("quest", "Quest, arXiv 2406.10774", Quest(k)),
    ]
    sets = {"": refreshkv_set(k)} | ({} if our_set is None else {OUR_SET: our_set})
    for suffix, selection in sets.items():
        tuned = {name: value for name, value in (thresholds or {}).items() if name.endswith(OUR_SET) == bool(suffix)}
        for name, (source, policy) in schedules(shape, budget, sentence_ends, seed).items():
            methods.append(Scheduled(name + suffix, source, policy, selection))
        for name, threshold in tuned.items():
            policy = LayerCosine(threshold, _check_every(name))
            methods.append(Scheduled(name, "RefreshKV dynamic, threshold tuned", policy, selection))
        never = "never refreshed: the prompt's last query chooses once"
        methods.append(Scheduled("never" + suffix, never, NeverFull(), selection))
        methods.append(EveryStep("fresh_top_k" + suffix, "the set of a full step, at every step", FreshTopK(selection)))
    unpooled = dataclasses.replace(our_set or Selection(k), pool_backward=0, pool_forward=0)
    ceiling = "sinks, window and the best tokens, chosen at every step: the ceiling"
    methods.append(EveryStep("fresh_top_k_ceiling", ceiling, FreshTopK(unpooled)))
    return methods


def schedules(
    shape: ModelShape, budget: float, sentence_ends: Sequence[int], seed: int
) -> dict[str, tuple[str, StepPolicy]]:
    """Source and policy of every schedule that has nothing to tune."""
    found: dict[str, tuple[str, StepPolicy]] = {
        f"refreshkv_s{stride}": ("RefreshKV fixed stride, arXiv 2411.05787", FixedStride(stride)) for stride in STRIDES
    }
    for every in CHECKS_EVERY:
        source = "RefreshKV dynamic, arXiv 2411.05787"
        found[dynamic_name(every, "published")] = source, LayerCosine(PUBLISHED_THRESHOLD, every)
    found["sfi"] = "SFI, arXiv 2603.12038", SentenceBoundary(tuple(sentence_ends), SFI_MAX_AGE)
    drawn = RandomRefresh.drawn(budget, (shape.layers, shape.kv_heads), seed)
    found["random"] = "full at random, each unit for itself", drawn
    return found


def dynamic_name(check_every: int, which: str) -> str:
    """Name of RefreshKV's dynamic schedule."""
    return f"refreshkv_qc{check_every}_{which}"


def _check_every(name: str) -> int:
    return next(every for every in CHECKS_EVERY if name.startswith(dynamic_name(every, "")))


def _kept(name: str, source: str, selection: Selection) -> Scheduled:
    return Scheduled(name, source, NeverFull(), selection)
