"""Each baseline by hand: which tokens it attends to at every step, on attention written down as a matrix.

Keys are unit vectors and queries logarithms of weights, so that attention is what is written here; values are unit
vectors too, so that the output of a step is its attention, and says what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from policies import (
    FixedStride,
    LayerCosine,
    ModelShape,
    NeverFull,
    RandomRefresh,
    Ranking,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.first_sets import FirstSets, first_sets_of_layer
from recycler.decode.plain.attention import GatheredSets
from recycler.decode.plain.step import PlainUnits
from recycler.evaluate.baselines import (
    CHECKS_EVERY,
    OUR_SET,
    PUBLISHED_THRESHOLD,
    SFI_MAX_AGE,
    STRIDES,
    baselines,
    dynamic_schedules,
    fresh_top_k,
    h2o_set,
    refreshkv_set,
    snapkv_set,
    streaming_llm_set,
    tova_set,
)
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.quest import Quest
from recycler.sets.prompt_votes import PromptVotes
from recycler.sets.scores import Scoring, probabilities

# Attention of a query head, up to a factor: a weight for each token, or the weights that are not 1.
Weights = Sequence[float] | Mapping[int, float]
FULL = "full"


def queries_of(weights: Sequence[Sequence[Weights]], head_dim: int) -> Tensor:
    """Queries `(kv_heads, group, head_dim)` of one token that attend so."""
    query = torch.zeros(len(weights), len(weights[0]), head_dim, dtype=torch.float64)
    for head, group in enumerate(weights):
        for member, row in enumerate(group):
            for place, weight in row.items() if isinstance(row, Mapping) else enumerate(row):
                query[head, member, place] = np.log(weight)
    return query


def decode(
    policy: StepPolicy,
    selection: Selection,
    prompt: Sequence[Sequence[Sequence[Weights]]],
    steps: Sequence[Sequence[Sequence[Weights]]],
    fed: Sequence[int] | None = None,
) -> list[list[str | list[int]]]:
    """What each KV head of a layer attends to at every step: "full", or the places.

    Args:
        policy: When to look at everything.
        selection: What is kept.
        prompt: Attention of every token of the prompt, `[token][kv_head][query head of the group]`.
        steps: The same of the decoded tokens; over a set it is what it is there, scaled to sum 1.
        fed: The tokens that are fed.
    """
    head_dim = len(prompt) + len(steps)
    kv_heads = len(prompt[0])
    queries = torch.stack([queries_of(weights, head_dim) for weights in [*prompt, *steps]], dim=2)[None]
    cache = torch.eye(head_dim, dtype=torch.float64).expand(1, kv_heads, -1, -1)
    end = len(prompt)
    last = queries[:, :, :, end - 1]
    votes = PromptVotes(selection.prompt_queries).see(queries[..., :end, :], cache[:, :, :end], None, Scoring(1.0))
    attention = probabilities(last @ cache[:, :, :end].transpose(-1, -2), None)
    chosen = first_sets_of_layer(0, selection, last, attention, 0, end, votes)
    units = PlainUnits(FirstSets.of([chosen], np.zeros(1, dtype=np.int64), end), policy)
    seen: list[list[str | list[int]]] = []
    for step in range(len(steps)):
        end += 1
        query = queries[:, :, :, end - 1]
        attention_now = GatheredSets(query, cache[:, :, :end], cache[:, :, :end], None, Scoring(1.0))
        attended = units.attend(0, query, attention_now, None if fed is None else torch.tensor([[fed[step]]]))
        full = units.full[:, 0] & ~units.keys_only[:, 0]
        read = [(attended.output[0, head] > 0).any(0).nonzero()[:, 0].tolist() for head in range(kv_heads)]
        assert all(places == list(range(end)) for places, whole in zip(read, full[0], strict=True) if whole)
        seen.append([FULL if whole else places for places, whole in zip(read, full[0], strict=True)])
    return seen


def alone(rows: Sequence[Weights]) -> list[list[list[Weights]]]:
    """Attention of a layer with one KV head and one query head."""
    return [[[row]] for row in rows]


def flat(n_tokens: int, n_heads: int = 1) -> list[list[list[Weights]]]:
    """The attention of tokens of no interest."""
    return [[[{}] for _ in range(n_heads)] for _ in range(n_tokens)]


def only(seen: list[list[str | list[int]]], head: int = 0) -> list[str | list[int]]:
    return [step[head] for step in seen]


def test_streaming_llm_keeps_four_sinks_and_the_latest_tokens_whatever_is_attended_to() -> None:
    # k = 6: 4 sinks and 2 latest tokens, the current one included.
    everyone_looks_at_five = alone([{}] * 5 + [{5: 99.0}] * 4)
    seen = decode(NeverFull(), streaming_llm_set(6), everyone_looks_at_five, alone([{5: 99.0}] * 3))
    assert only(seen) == [[0, 1, 2, 3, 8, 9], [0, 1, 2, 3, 9, 10], [0, 1, 2, 3, 10, 11]]


def test_streaming_llm_keeps_all_that_there_is_until_the_set_is_full() -> None:
    seen = decode(NeverFull(), streaming_llm_set(6), flat(4), flat(4))
    assert only(seen) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 6, 7]]


def snapkv_prompt() -> list[list[list[Weights]]]:
    """20 tokens, one KV head of two query heads. Rows of queries 18 and 19 sum to 100."""
    prompt = flat(20)
    prompt = [[[{}, {}]] for _ in prompt]
    prompt[10] = [[{2: 1e6}, {2: 1e6}]]  # Before the observation window.
    prompt[18] = [[{5: 82.0}, {5: 82.0}]]
    prompt[19] = [[{12: 81.0}, {}]]
    return prompt


def test_snapkv_keeps_what_its_observation_window_voted_for_and_the_neighbours() -> None:
    # k = 8: the window is a quarter, 2 tokens, and queries 18 and 19 vote. Means of their sums over the heads, in
    # percent: token 5 (83 + 87) / 2 = 85, token 12 (82 + 6) / 2 = 44, token 2 (2 + 6) / 2 = 4. The last query alone
    # would have taken 12. Pooled by 7, token 5 lifts 2 ... 8, of which the latest six fit: {3 ... 8} + {18, 19}.
    seen = decode(NeverFull(), snapkv_set(8), snapkv_prompt(), [[[{12: 99.0}, {12: 99.0}]]] * 4)
    assert only(seen) == [
        # 18 is out of the window of 2 that slides along, and nobody voted for it.
        [3, 4, 5, 6, 7, 8, 19, 20],
        # The same with 19.
        [3, 4, 5, 6, 7, 8, 20, 21],
        # New tokens have no votes, and stay; of the equal ones of the prompt the oldest leaves. Never looked again:
        # 12 is not found, however much the queries would attend to it.
        [4, 5, 6, 7, 8, 20, 21, 22],
        [5, 6, 7, 8, 20, 21, 22, 23],
    ]


def test_snapkv_averages_the_heads_of_a_group() -> None:
    # With k = 4 the window is 1, and the last query votes alone. Its rows sum to 100: token 9 has (60 + 1) / 2 in the
    # mean of the heads, token 2 (22 + 40) / 2, token 14 (1 + 42) / 2.
    last: list[list[Weights]] = [[{9: 60.0, 2: 22.0}, {2: 40.0, 14: 42.0}]]
    prompt: list[list[list[Weights]]] = [*[[[{}, {}]]] * 19, last]
    seen = decode(NeverFull(), snapkv_set(4), prompt, [[[{}, {}]]])
    # Token 2 lifts 0 ... 5, of which three fit beside 19. As 20 comes, 19 leaves.
    assert only(seen) == [[3, 4, 5, 20]]


def test_snapkv_s_window_is_a_quarter_of_the_set_and_32_at_most() -> None:
    for k, window in ((4, 1), (64, 16), (128, 32), (1024, 32)):
        selection = snapkv_set(k)
        assert (selection.window, selection.prompt_queries) == (window, window)


def test_h2o_chooses_by_the_attention_of_all_queries_of_the_prompt_averaged_over_the_heads() -> None:
    # Two query heads of one KV head, percent.
    first = [
        [100],
        [40, 60],
        [30, 60, 10],
        [20, 30, 40, 10],
        [20, 30, 40, 5, 5],
        [20, 20, 40, 5, 5, 10],
    ]
    second = [
        [100],
        [96, 4],
        [86, 4, 10],
        [50, 4, 40, 6],
        [50, 4, 40, 3, 3],
        [2, 4, 40, 50, 2, 2],
    ]
    prompt = [[[*pair]] for pair in zip(first, second, strict=True)]
    # Sums down the columns: tokens 0 ... 3 have 230, 200, 130, 20 and 384, 20, 130, 59; means 307, 110, 130, 39.5.
    # (The better head would take 1 before 2, the last query 2 and 3.) k = 4: {0, 2} and the latest half {4, 5}; as 6
    # comes, the half is {5, 6}, and 4 with (10 + 5) / 2 leaves.
    assert only(decode(NeverFull(), h2o_set(4), prompt, [[[{}, {}]]])) == [[0, 2, 5, 6]]


def test_h2o_keeps_the_latest_half_and_of_the_others_the_heaviest_by_accumulated_attention() -> None:
    # Percent. Sums down the columns: 300, 50, 30, 20.
    prompt = alone([[100], [90, 10], [60, 30, 10], [50, 10, 20, 20]])
    steps = alone(
        [
            {0: 10, 1: 2, 3: 80, 4: 8},
            {0: 10, 3: 10, 4: 75, 5: 5},
            {0: 4, 3: 1, 5: 94, 6: 1},
            {0: 1, 3: 1, 6: 97, 7: 1},
        ]
    )
    seen = decode(NeverFull(), h2o_set(4), prompt, steps)
    assert only(seen) == [
        # The latest half is {3, 4}: of 0 (300), 1 (50) and 2 (30) the last leaves.
        [0, 1, 3, 4],
        # Now 0 has 310, 1 has 52, and 3, out of the half, 20 + 80: it has overtaken 1.
        [0, 3, 4, 5],
        # 0 has 320, 3 has 110; 4 began at 0 and has 8 + 75, most of the latest query, but less in total.
        [0, 3, 5, 6],
        # 0 has 324, 3 has 111; 5 has 5 + 94.
        [0, 3, 6, 7],
    ]


def test_h2o_s_halves_are_halves() -> None:
    assert [h2o_set(k).window for k in (4, 64, 101)] == [2, 32, 50]


def test_tova_drops_what_the_latest_query_attends_to_least_in_the_mean_of_all_heads_of_the_layer() -> None:
    # Two KV heads of one query head, percent.
    prompt = [*flat(4, n_heads=2), [[[40, 30, 10, 10, 10]], [[10, 10, 60, 10, 10]]]]
    steps: list[list[list[Weights]]] = [
        [[{0: 20, 2: 10, 5: 70}], [{0: 20, 2: 40, 5: 40}]],
        [[{2: 60, 5: 10, 6: 30}], [{2: 20, 5: 30, 6: 50}]],
        [[{2: 60, 6: 30, 7: 10}], [{2: 60, 6: 30, 7: 10}]],
        [[{2: 1, 6: 1, 8: 98}], [{2: 1, 6: 1, 8: 98}]],
    ]
    seen = decode(NeverFull(), tova_set(3), prompt, steps)
    expected = [
        # The prompt's last query has means 25, 20, 35, 10, 10: {0, 1, 2}, of which 1 leaves for 5.
        [0, 2, 5],
        # Means over {0, 2, 5}: 20, 25, 55. In the first head alone, 2 would have left.
        [2, 5, 6],
        # 40, 20, 40: of the two latest tokens one leaves; nothing shelters them.
        [2, 6, 7],
        # 60, 30, 10: the token before this one leaves.
        [2, 6, 8],
    ]
    assert only(seen, 0) == only(seen, 1) == expected


def test_tova_pools_query_heads_of_every_kv_head() -> None:
    # Means over all four heads of the last query, percent: 31, 20, 30, 19; of the two KV heads 60, 1 ... and 1, 39 ...
    last: list[list[Weights]] = [[[60, 1, 38, 1], [60, 1, 38, 1]], [[2, 39, 22, 37], [2, 39, 22, 37]]]
    prompt: list[list[list[Weights]]] = [[[{}, {}], [{}, {}]]] * 3 + [last]
    seen = decode(NeverFull(), tova_set(3), prompt, [[[{}, {}], [{}, {}]]])
    # {0, 1, 2}, and 1 leaves for 4.
    assert seen == [[[0, 2, 4], [0, 2, 4]]]


def refreshkv_prompt() -> list[list[list[Weights]]]:
    """16 tokens, one KV head of two query heads; the last row sums to 100 in both."""
    return [[[{}, {}]]] * 15 + [[[{6: 76.0, 12: 10.0}, {12: 70.0, 3: 16.0}]]]


def test_refreshkv_keeps_the_best_of_a_groups_heads_and_three_neighbours_on_each_side() -> None:
    # Token 6 has 76 in its best head, token 12 has 70 (in the mean it would be 38.5 against 40). It lifts 3 ... 9,
    # which are k = 7; the latest token is not kept for being the latest, and as tokens come, the oldest leave.
    seen = decode(NeverFull(), refreshkv_set(7), refreshkv_prompt(), [[[{}, {}]]] * 3)
    assert only(seen) == [[4, 5, 6, 7, 8, 9, 16], [5, 6, 7, 8, 9, 16, 17], [6, 7, 8, 9, 16, 17, 18]]


def test_refreshkv_chooses_anew_by_the_query_of_each_full_step_of_its_stride() -> None:
    steps: list[list[list[Weights]]] = [[[{}, {}]]] * 7
    steps[1] = [[{2: 1e6}, {}]]  # No full step: it chooses nothing.
    steps[2] = [[{}, {12: 90.0}]]
    steps[5] = [[{16: 90.0}, {}]]
    seen = decode(FixedStride(3), refreshkv_set(7), refreshkv_prompt(), steps)
    assert only(seen) == [
        [4, 5, 6, 7, 8, 9, 16],
        [5, 6, 7, 8, 9, 16, 17],
        FULL,
        # 12 lifts 9 ... 15; one leaves for each that comes.
        [10, 11, 12, 13, 14, 15, 19],
        [11, 12, 13, 14, 15, 19, 20],
        FULL,
        # 16 lifts 13 ... 19.
        [14, 15, 16, 17, 18, 19, 22],
    ]


def test_refreshkv_dynamic_looks_every_fifth_step_whether_the_layers_mean_query_has_turned_away() -> None:
    peak = float(np.exp(4.0))
    # Two KV heads of one query head. The mean query has 2 at place 2 and 2 at place 6.
    prompt = [*flat(15, 2), [[{2: peak}], [{6: peak}]]]
    steps = flat(12, 2)
    steps[2] = [[{10: peak}], [{10: peak}]]  # Turned away, but nobody looks.
    steps[4] = [[{2: peak}], [{10: peak}]]  # Cosine 1/2: the first head runs full too, though it has not turned.
    steps[9] = [[{2: peak}], [{10: peak, 6: float(np.exp(2.0))}]]  # 8 / sqrt(8 x 9) = 0.94 to step 4.
    seen = decode(LayerCosine(PUBLISHED_THRESHOLD, 5), refreshkv_set(7), prompt, steps)
    assert [step for step, places in enumerate(only(seen)) if places == FULL] == [4]
    assert [step for step, places in enumerate(only(seen, 1)) if places == FULL] == [4]
    # Head 0: 2 lifts 0 ... 5, and the latest of the others comes with them, to leave first.
    assert only(seen)[:2] == [[0, 1, 2, 3, 4, 5, 16], [1, 2, 3, 4, 5, 16, 17]]
    assert only(seen)[5:7] == [[0, 1, 2, 3, 4, 5, 21], [1, 2, 3, 4, 5, 21, 22]]
    # Head 1: 6 lifts 3 ... 9, and after the full step 10 lifts 7 ... 13.
    assert only(seen, 1)[:2] == [[4, 5, 6, 7, 8, 9, 16], [5, 6, 7, 8, 9, 16, 17]]
    assert only(seen, 1)[5:7] == [[8, 9, 10, 11, 12, 13, 21], [9, 10, 11, 12, 13, 21, 22]]
    # Not chosen again at step 9.
    assert only(seen, 1)[10] == [13, 21, 22, 23, 24, 25, 26]


def test_refreshkv_dynamic_stays_full_where_the_query_turns_at_every_look() -> None:
    prompt = flat(15) + alone([{2: 9.0}])
    steps = alone([{place: 9.0} for place in range(3, 15)])
    seen = only(decode(LayerCosine(PUBLISHED_THRESHOLD, 5), refreshkv_set(7), prompt, steps))
    assert [step for step, places in enumerate(seen) if places == FULL] == [4, 9]


def test_sfi_looks_again_at_the_end_of_a_sentence_and_when_32_steps_have_passed() -> None:
    fed = [5, 9, 5, 5] + [5] * 34
    steps = alone([{}, {12: 90.0}, {3: 90.0}] + [{}] * 35)
    prompt = flat(15) + alone([{6: 90.0}])
    seen = only(decode(SentenceBoundary((9, 11), SFI_MAX_AGE), refreshkv_set(7), prompt, steps, fed))
    # The token 9 is fed at step 1; 32 steps later the set is 32 steps old.
    assert [step for step, places in enumerate(seen) if places == FULL] == [1, 33]
    assert seen[0] == [4, 5, 6, 7, 8, 9, 16]
    # Chosen by the query of the token that ends the sentence: 12 lifts 9 ... 15.
    assert seen[2:4] == [[10, 11, 12, 13, 14, 15, 18], [11, 12, 13, 14, 15, 18, 19]]


def test_random_refreshes_each_unit_at_its_own_random_steps() -> None:
    # Step n, from 1, is full where phase + rate x n^2 has a fraction below 0.3. First head: .2, .8, .8, .2; second
    # head: .45, .75, .25, .95.
    policy = RandomRefresh(0.3, rate=((0.2, 0.1),), phase=((0.0, 0.35),))
    prompt = [*flat(15, 2), [[{6: 90.0}], [{6: 90.0}]]]
    steps: list[list[list[Weights]]] = [[[{12: 90.0}], [{12: 90.0}]]] * 4
    seen = decode(policy, refreshkv_set(7), prompt, steps)
    assert only(seen, 0) == [FULL, [10, 11, 12, 13, 14, 15, 17], [11, 12, 13, 14, 15, 17, 18], FULL]
    assert only(seen, 1) == [
        [4, 5, 6, 7, 8, 9, 16],
        [5, 6, 7, 8, 9, 16, 17],
        FULL,
        [10, 11, 12, 13, 14, 15, 19],
    ]


def test_fresh_top_k_attends_to_the_set_that_this_steps_own_query_would_choose() -> None:
    method = fresh_top_k("fresh", "", refreshkv_set(7))
    # As RefreshKV at a full step, and nothing is left of the step before.
    steps = [[[{6: 76.0, 12: 10.0}, {12: 70.0, 3: 16.0}]], [[{}, {12: 90.0}]]]
    seen = decode(method.policy, method.selection, [[[{9: 90.0}, {9: 90.0}]]] * 15, steps)
    assert only(seen) == [[3, 4, 5, 6, 7, 8, 9], [9, 10, 11, 12, 13, 14, 15]]


def test_the_ceiling_is_sinks_window_and_the_single_best_tokens() -> None:
    method = fresh_top_k("fresh", "", Selection(5, sinks=1, window=2, pool_backward=0, pool_forward=0))
    # Two KV heads of one query head each: {0}, {8, 9}, and the two best of the rest.
    step: list[list[Weights]] = [[{3: 9.0, 6: 8.0, 5: 7.0}], [{5: 9.0, 2: 8.0, 9: 99.0}]]
    (found,) = decode(method.policy, method.selection, flat(9, 2), [step])
    assert found == [[0, 3, 6, 8, 9], [0, 2, 5, 8, 9]]


def test_quest_attends_to_the_pages_whose_largest_and_smallest_channels_promise_most() -> None:
    key = torch.tensor([[[1, 0], [0, 1], [1.5, 0], [1.4, 0], [-5, 0], [0, -5], [0.5, 0.5]]])
    quest = Quest("quest", "", 4, page_tokens=2, dense_layers=0)
    # The four pages promise the query (1, 1) 1 + 1, 1.5 + 0, 0 + 0 and 0.5 + 0.5: the first has no key that keeps the
    # promise, and is taken. They promise (-1, -1) 0, -1.4, 10 and -1.
    both = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    chosen = quest.choose(2, both, key).allowed
    assert [head.nonzero()[:, 0].tolist() for head in chosen[0]] == [[0, 1, 2, 3], [0, 1, 4, 5]]


# The table of all of them.

K = 64
SHAPE = ModelShape("tiny", layers=3, kv_heads=2, query_heads=4, head_dim=8)
OURS = Selection(K, sinks=2, window=8)


def named(k: int = K, our_set: Selection | None = None) -> dict[str, Method]:
    methods = baselines(k, SHAPE, 0.1, (7, 9), our_set=our_set)
    by_name = {method.name: method for method in methods}
    assert len(by_name) == len(methods)
    return by_name


def test_baselines_that_look_once_never_look_again() -> None:
    methods = named()
    for name, selection in (
        ("streaming_llm", streaming_llm_set(K)),
        ("snapkv", snapkv_set(K)),
        ("h2o", h2o_set(K)),
        ("tova", tova_set(K)),
        ("never", refreshkv_set(K)),
    ):
        method = methods[name]
        assert isinstance(method, Scheduled)
        assert (method.policy, method.selection) == (NeverFull(), selection)


@pytest.mark.parametrize("suffix", ["", OUR_SET])
def test_schedules_run_with_refreshkv_s_set_and_once_more_with_ours(suffix: str) -> None:
    methods = named(our_set=OURS)
    expected: dict[str, StepPolicy] = {f"refreshkv_s{stride}": FixedStride(stride) for stride in (5, 10, 25, 50)}
    expected |= {f"refreshkv_qc{every}_published": LayerCosine(0.85, every) for every in (5, 10)}
    expected["sfi"] = SentenceBoundary((7, 9), 32)
    expected["random"] = RandomRefresh.drawn(0.1, (3, 2), 0)
    expected["never"] = NeverFull()
    for name, policy in expected.items():
        method = methods[name + suffix]
        assert isinstance(method, Scheduled)
        assert method.policy == policy
        assert method.selection == (OURS if suffix else refreshkv_set(K))
    assert (STRIDES, CHECKS_EVERY) == ((5, 10, 25, 50), (5, 10))


def test_methods_that_choose_at_every_step() -> None:
    methods = named(our_set=OURS)
    assert methods["quest"] == Quest("quest", "Quest, arXiv 2406.10774", K, page_tokens=16, dense_layers=2)
    fresh = {name: method for name, method in methods.items() if name.startswith("fresh")}
    assert {name: method.settings() for name, method in fresh.items()} == {
        name: fresh_top_k(name, "", selection).settings()
        for name, selection in (
            ("fresh_top_k", refreshkv_set(K)),
            ("fresh_top_k" + OUR_SET, OURS),
            ("fresh_top_k_ceiling", dataclasses.replace(OURS, pool_backward=0, pool_forward=0)),
        )
    }


def test_without_our_set_there_is_none_of_ours() -> None:
    assert not [name for name in named() if name.endswith(OUR_SET)]
    assert set(named()) < set(named(our_set=OURS))


def test_dynamic_schedules_are_there_with_either_set_and_at_the_threshold_given() -> None:
    unpooled = dataclasses.replace(Selection.unpooled(K), unit_k=((60, 68), (64, 64), (64, 64)))
    found = {one.name: one.method(0.5, K, unpooled) for one in dynamic_schedules(unpooled)}
    assert {name: (one.policy, one.selection) for name, one in found.items()} == {
        "refreshkv_qc5_tuned": (LayerCosine(0.5, 5), refreshkv_set(K)),
        "refreshkv_qc10_tuned": (LayerCosine(0.5, 10), refreshkv_set(K)),
        "refreshkv_qc5_tuned" + OUR_SET: (LayerCosine(0.5, 5), unpooled.pooled()),
        "refreshkv_qc10_tuned" + OUR_SET: (LayerCosine(0.5, 10), unpooled.pooled()),
    }
    assert all(name == one.name for name, one in found.items())
    assert [one.name for one in dynamic_schedules(None)] == ["refreshkv_qc5_tuned", "refreshkv_qc10_tuned"]


def test_all_sets_are_of_one_size() -> None:
    for method in named(our_set=OURS).values():
        assert isinstance(method, (Scheduled, Quest))
        assert (method.k if isinstance(method, Quest) else method.selection.k) == K


@pytest.mark.parametrize(
    ("k", "message"), [(50, "k must be a multiple of 16"), (32, "k must hold the sinks and the window"), (2, "window")]
)
def test_a_k_that_some_method_cannot_have_is_refused(k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(k)


def test_a_set_of_ours_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="methods are compared at equal k: the policy's set has 64 tokens, not 128"):
        named(128, our_set=OURS)


def test_the_ceiling_of_a_set_with_sizes_of_units_has_them_too() -> None:
    sized = dataclasses.replace(OURS, unit_k=tuple((K - 5, K + 5) for _ in range(SHAPE.layers)))
    methods = named(our_set=sized)
    for name in ("fresh_top_k_ceiling", "fresh_top_k" + OUR_SET):
        assert methods[name].selection.unit_k == sized.unit_k  # type: ignore[attr-defined]


def test_a_set_of_ours_for_another_model_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match="the selection is for 1 layers x 1 KV heads, but "):
        named(our_set=dataclasses.replace(OURS, unit_k=((K,),)))


def test_schedules_get_the_pooled_form_of_an_unpooled_set() -> None:
    unpooled = dataclasses.replace(Selection.unpooled(64), unit_k=((60, 68), (64, 64)))
    shape = ModelShape("tiny", 2, 2, 4, 8)
    found = {one.name: one for one in baselines(64, shape, 0.1, (1,), our_set=unpooled)}
    stride = found["refreshkv_s10" + OUR_SET]
    assert isinstance(stride, Scheduled)
    assert stride.selection == unpooled.pooled() == Selection(64, prompt_queries=32, ranking=Ranking.DECAYED)
