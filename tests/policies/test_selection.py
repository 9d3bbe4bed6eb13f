from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

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
