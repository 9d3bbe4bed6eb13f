from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from traces import Trace, TraceHeader


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        "recovered_mass",
        "query_similarity",
        "overlap",
        "fresh_mass",
        "token_log_prob",
    ],
)
def test_an_array_one_step_short_is_refused_by_name_with_both_shapes(
    make_trace: Callable[..., Trace], name: str
) -> None:
    trace = make_trace()
    array = getattr(trace, name)
    with pytest.raises(ValueError, match=f"^{name} must have shape") as caught:
        dataclasses.replace(trace, **{name: array[:-1]})
    assert str(array.shape) in str(caught.value)
    assert str(array[:-1].shape) in str(caught.value)


def test_arrays_of_another_model_shape_are_refused(make_trace: Callable[..., Trace]) -> None:
    other = make_trace(units=(3, 2))
    with pytest.raises(ValueError, match="recovered_mass must have shape"):
        dataclasses.replace(make_trace(), recovered_mass=other.recovered_mass)


def test_layers_and_kv_heads_swapped_are_refused(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    with pytest.raises(ValueError, match="overlap must have shape"):
        dataclasses.replace(trace, overlap=trace.overlap.swapaxes(2, 3))


def test_a_trace_is_named_after_its_prompt(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace("poem-3", "verse")
    assert (trace.name, trace.kind, trace.header.units) == ("poem-3", "verse", (2, 3))


def test_arrays_lists_all_fields_but_the_header_in_their_order(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    assert list(trace.arrays()) == [
        "tokens",
        "recovered_mass",
        "query_similarity",
        "overlap",
        "fresh_mass",
        "token_log_prob",
    ]
    assert all(array is getattr(trace, name) for name, array in trace.arrays().items())


def test_a_header_survives_its_json(make_trace: Callable[..., Trace]) -> None:
    header = make_trace().header
    assert TraceHeader.from_json(header.to_json()) == header


def test_equal_headers_are_equal_text_whatever_the_order_of_their_keys(make_trace: Callable[..., Trace]) -> None:
    header = make_trace().header
    reordered = dataclasses.replace(header, model=dict(reversed(list(header.model.items()))))
    assert reordered.to_json() == header.to_json()
    assert "\n" not in header.to_json()


@pytest.mark.parametrize("field", ["model", "selection", "prompt", "n_steps", "ages", "versions"])
def test_a_header_without_one_of_its_fields_is_refused(make_trace: Callable[..., Trace], field: str) -> None:
    fields = json.loads(make_trace().header.to_json())
    del fields[field]
    with pytest.raises(ValueError, match=f"other fields than format.*{field}"):
        TraceHeader.from_json(json.dumps(fields))


def test_a_header_with_an_unknown_field_is_refused(make_trace: Callable[..., Trace]) -> None:
    fields = json.loads(make_trace().header.to_json()) | {"temperature": 1.0}
    with pytest.raises(ValueError, match="temperature"):
        TraceHeader.from_json(json.dumps(fields))


@pytest.mark.parametrize(("field", "key"), [("model", "layers"), ("model", "kv_heads"), ("prompt", "n_prompt_tokens")])
def test_a_header_from_which_the_shapes_do_not_follow_is_refused(
    make_trace: Callable[..., Trace], field: str, key: str
) -> None:
    fields = json.loads(make_trace().header.to_json())
    del fields[field][key]
    with pytest.raises(ValueError, match=key):
        TraceHeader.from_json(json.dumps(fields))


def test_a_trace_without_steps_is_a_trace(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(n_steps=0)
    assert trace.recovered_mass.shape == (0, 4, 2, 3)
    assert trace.fresh_mass.shape == (1, 2, 3)
    assert np.array_equal(trace.token_log_prob, [])
