"""Which selections a trace can be recorded for: those whose sets follow from one step of one unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from policies import Selection
from recycler.prompts import Prompt
from recycler.record.one_prompt import record_trace, trace_header

REFUSED = [
    ({"group": "layer_mean"}, "selections with group 'max' or 'mean', not 'layer_mean'"),
    ({"prompt_queries": None}, "selections with a number of prompt_queries, not with all of them"),
]


def prompt_of(tokens: Tensor, n_steps: int = 4) -> Prompt:
    return Prompt("random", "noise", tokens[0].numpy(), tokens.shape[1] - n_steps, "drawn", "CC0-1.0")


@pytest.mark.parametrize(("how", "message"), REFUSED, ids=lambda value: str(value))
@pytest.mark.parametrize("record", [record_trace, trace_header])
def test_a_set_that_hangs_on_other_steps_or_units_is_refused_by_name(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    record: Callable[..., Any],
    how: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        record(make_model(), prompt_of(make_tokens(20)), Selection(7, 1, 2, **how), max_age=2)


def test_it_is_refused_before_the_model_runs(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match="layer_mean"):
        record_trace(model, prompt_of(make_tokens(20)), Selection(7, 1, 2, group="layer_mean"), max_age=2)


@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated", "decayed"])
@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("prompt_queries", [1, 3])
def test_all_others_are_recorded(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    ranking: str,
    group: str,
    prompt_queries: int,
) -> None:
    selection = Selection(7, 1, 2, ranking=ranking, group=group, prompt_queries=prompt_queries)
    trace = record_trace(make_model(), prompt_of(make_tokens(20)), selection, max_age=2)
    assert Selection(**trace.header.selection) == selection


def test_sizes_of_units_are_in_the_header_as_a_file_holds_them(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    selection = Selection(7, 1, 2, unit_k=((3, 11), (9, 5)))
    header = record_trace(make_model(), prompt_of(make_tokens(20)), selection, max_age=2).header
    assert Selection(**header.selection) == selection
    assert type(header).from_json(header.to_json()) == header


@pytest.mark.parametrize("record", [record_trace, trace_header])
def test_sizes_for_another_model_are_refused_with_both_shapes_before_the_model_runs(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[..., Any],
) -> None:
    model = make_model()

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", forward)
    selection = Selection(7, 1, 2, unit_k=((7, 7, 7),))
    with pytest.raises(ValueError, match=r"^the selection is for 1 layers x 3 KV heads, but .* has 2 layers x 2 KV"):
        record(model, prompt_of(make_tokens(20)), selection, max_age=2)
