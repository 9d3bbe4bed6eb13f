from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import GroupPooling, Ranking, Selection


def test_names_from_json_become_the_choices_that_they_name() -> None:
    selection = Selection(64, group="mean", ranking="updated")  # type: ignore[arg-type]
    assert (selection.group, selection.ranking) == (GroupPooling.MEAN, Ranking.UPDATED)
    assert selection == Selection(64, group=GroupPooling.MEAN, ranking=Ranking.UPDATED)


def test_a_selection_comes_back_from_json_equal() -> None:
    selection = Selection(64, 0, 8, 3, 3, GroupPooling.MEAN, Ranking.UPDATED)
    assert Selection(**json.loads(json.dumps(dataclasses.asdict(selection)))) == selection
    assert hash(Selection(64)) == hash(Selection(64))


def test_the_kernel_of_the_paper_is_allowed() -> None:
    assert Selection(1, sinks=0, window=0, pool_backward=3, pool_forward=3).k == 1


@pytest.mark.parametrize("name", ["k", "sinks", "window", "pool_backward", "pool_forward"])
@pytest.mark.parametrize("value", [-1, 2.0, 1.5, True, "3", None])
def test_what_is_no_number_of_tokens_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of tokens, 0 or more, not {value!r}"):
        Selection(**{"k": 64, name: value})


@pytest.mark.parametrize(
    ("k", "sinks", "window", "needed"),
    [(35, 4, 32, "4 + 32 = 36"), (4, 4, 0, "4 + 1 = 5"), (0, 0, 0, "0 + 1 = 1"), (9, 0, 10, "0 + 10 = 10")],
)
def test_a_set_too_small_for_its_sinks_and_window_is_refused_with_the_sum(
    k: int, sinks: int, window: int, needed: str
) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, but ") as error:
        Selection(k, sinks, window)
    assert needed in str(error.value)
    assert Selection(int(needed.split()[-1]), sinks, window).window == window


@pytest.mark.parametrize(("name", "value"), [("group", "median"), ("ranking", "newest")])
def test_an_unknown_choice_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"'{value}' is not a valid"):
        Selection(**{"k": 64, name: value})


def test_a_layers_mean_and_accumulated_attention_are_choices_too() -> None:
    selection = Selection(64, group="layer_mean", ranking="accumulated")  # type: ignore[arg-type]
    assert (selection.group, selection.ranking) == (GroupPooling.LAYER_MEAN, Ranking.ACCUMULATED)
    assert Selection(**json.loads(json.dumps(dataclasses.asdict(selection)))) == selection


@pytest.mark.parametrize("prompt_queries", [1, 32, None])
def test_how_many_queries_choose_the_first_set_comes_back_from_json(prompt_queries: int | None) -> None:
    selection = Selection(64, prompt_queries=prompt_queries)
    assert Selection(**json.loads(json.dumps(dataclasses.asdict(selection)))) == selection
    assert selection.prompt_queries == prompt_queries


def test_the_last_query_alone_chooses_unless_told_otherwise() -> None:
    assert Selection(64) == Selection(64, prompt_queries=1) != Selection(64, prompt_queries=None)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", "all"])
def test_what_is_no_number_of_queries_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"prompt_queries must be a whole number, 1 or more, or none .*{value!r}"):
        Selection(64, prompt_queries=value)


def test_the_unpooled_set_takes_no_neighbours_and_lets_the_prompts_last_queries_choose() -> None:
    unpooled = Selection.unpooled(64)
    assert (unpooled.k, unpooled.pool_backward, unpooled.pool_forward, unpooled.prompt_queries) == (64, 0, 0, 32)
    assert unpooled == Selection(64, pool_forward=0, prompt_queries=32, ranking="decayed")  # type: ignore[arg-type]


SIZES = ((40, 64, 88), (36, 100, 56))


def test_a_table_of_sizes_comes_back_from_json_equal_and_hashes() -> None:
    selection = Selection(64, unit_k=SIZES)
    loaded = Selection(**json.loads(json.dumps(selection.to_json())))
    assert loaded == selection
    assert hash(loaded) == hash(selection)
    assert loaded.unit_k == SIZES


def test_json_values_are_plain() -> None:
    values = Selection(64, group=GroupPooling.MEAN, unit_k=SIZES).to_json()
    assert values == json.loads(json.dumps(values))
    assert values["unit_k"] == [list(row) for row in SIZES]
    assert type(values["group"]) is str


@pytest.mark.parametrize("convert", [list, np.array, lambda table: np.array(table, dtype=np.float64)])
def test_a_table_of_sizes_becomes_tuples_of_whole_numbers(convert: Callable[[Any], Any]) -> None:
    selection = Selection(64, unit_k=convert([list(row) for row in SIZES]))
    assert selection == Selection(64, unit_k=SIZES)
    assert {type(size) for row in selection.unit_k or () for size in row} == {int}


def test_the_largest_of_all_sets_is_the_widest() -> None:
    assert Selection(64).widest == 64
    assert Selection(64, unit_k=SIZES).widest == 100
    assert Selection(64, unit_k=((40, 41),)).widest == 41


def test_sizes_belong_to_a_model_shape_and_their_absence_to_every() -> None:
    assert Selection(64, unit_k=SIZES).unit_shapes() == {(2, 3)}
    assert Selection(64).unit_shapes() == frozenset()


def test_sizes_may_use_the_whole_of_k_on_average_and_no_more() -> None:
    assert np.mean(Selection(64, unit_k=SIZES).unit_k) == 64
    with pytest.raises(ValueError, match=r"^unit_k must have a mean of at most k, and 64\.5 is above 64\.$"):
        Selection(64, unit_k=((65, 64),))


@pytest.mark.parametrize(("sinks", "window", "least"), [(4, 32, 36), (4, 0, 5), (0, 0, 1)])
def test_a_unit_whose_set_is_too_small_for_sinks_and_window_is_refused(sinks: int, window: int, least: int) -> None:
    assert Selection(64, sinks, window, unit_k=((least, 64),)).widest == 64
    with pytest.raises(ValueError, match=f"^unit_k must be at least {least}, not {least - 1}\\.$"):
        Selection(64, sinks, window, unit_k=((64, least - 1),))


@pytest.mark.parametrize(("value", "named"), [(64, "64"), (40.5, "40.5"), ([[64, 40.5]], "40.5")])
def test_what_is_no_table_of_whole_numbers_is_no_sizes(value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^unit_k must be a table of whole numbers with .*, not {named}\\.$"):
        Selection(64, unit_k=value)


@pytest.mark.parametrize("value", [[40, 50], [], [[]], [[40, 50], [40]], "64", [["many"]]])
def test_what_is_no_table_is_no_sizes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^unit_k must be one number, or a table with one row per layer "):
        Selection(64, unit_k=value)


def test_where_a_layer_shares_its_tokens_its_units_share_their_size() -> None:
    assert Selection(64, group=GroupPooling.LAYER_MEAN, unit_k=((40, 40), (88, 88))).widest == 88
    with pytest.raises(ValueError, match=r"each row of unit_k must be one number repeated, not \(40, 41\)\.$"):
        Selection(64, group=GroupPooling.LAYER_MEAN, unit_k=((50, 50), (40, 41)))


@given(
    sizes=st.lists(st.lists(st.integers(40, 300), min_size=3, max_size=3), min_size=2, max_size=4),
    k=st.integers(36, 600),
)
def test_at_another_k_sizes_keep_their_proportion_as_far_as_sinks_and_window_allow(
    sizes: list[list[int]], k: int
) -> None:
    mean = math.ceil(np.mean(sizes))
    selection = Selection(mean, unit_k=sizes).at_k(k)
    assert selection.k == k
    found, before = np.array(selection.unit_k), np.array(sizes)
    assert found.mean() <= k
    assert (found >= 36).all()
    # Where none had to grow to the least size, each is what it was, to a token.
    wanted = before * k / mean
    if (wanted >= 36).all():
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1)
    assert Selection(mean).at_k(k) == Selection(k)


def test_a_k_without_room_for_sinks_and_window_is_refused() -> None:
    with pytest.raises(ValueError, match="k must hold the sinks and the window: k is 35"):
        Selection(128, unit_k=((100, 156),)).at_k(35)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), True, "0.5"])
def test_a_decay_that_is_no_share_is_refused(decay: object) -> None:
    with pytest.raises(ValueError, match="score_decay must be the share of a score that is left after a step"):
        Selection(64, ranking="decayed", score_decay=decay)  # type: ignore[arg-type]


def test_every_ranking_says_what_a_token_keeps_of_its_score() -> None:
    kept = {ranking: Selection(64, ranking=ranking, score_decay=0.25).score_kept for ranking in Ranking}
    assert kept == {
        Ranking.LAST_FULL: None,
        Ranking.UPDATED: 0,
        Ranking.ACCUMULATED: 1,
        Ranking.DECAYED: 0.25,
    }


@pytest.mark.parametrize("name", ["k", "sinks", "window", "pool_backward", "pool_forward", "prompt_queries"])
def test_more_tokens_than_any_context_has_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at most 1,073,741,824 tokens, not 10{{18}}"):
        Selection(**{"k": 64, name: 10**18})


def test_no_number_is_far_beyond_the_context_that_a_selection_is_for() -> None:
    huge = Selection(2**30, sinks=2**28, window=2**28, pool_backward=2**29, pool_forward=2**29)
    assert huge.within(100) == Selection(301, sinks=100, window=100, pool_backward=100, pool_forward=100)
    sized = Selection(1000, unit_k=((40, 1960), (500, 1500)))
    assert sized.within(100).unit_k == ((40, 137), (137, 137))
    assert sized.within(10_000) == sized
