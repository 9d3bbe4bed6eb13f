"""What is known of a model, and which models have no cache to recycle."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from policies import ModelShape
from recycler.model.shape import (
    check_positions,
    max_positions,
    model_shape,
    n_layers,
    recycled_layers,
    window_of_recycled_layers,
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_shape_is_that_of_the_config(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    assert model_shape(make_model(family), "tiny") == ModelShape("tiny", 2, 2, 4, 8)
    other = make_model(family, layers=3, query_heads=4, kv_heads=4, head_dim=16)
    assert model_shape(other, "tiny") == ModelShape("tiny", 3, 4, 4, 16)


def test_model_without_a_path_is_called_by_its_class(make_model: Callable[..., PreTrainedModel]) -> None:
    assert model_shape(make_model()).id == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("kinds", "recycled"),
    [
        (["full_attention", "linear_attention"], {0: 0}),
        (["chunked_attention", "full_attention"], {1: 0}),
        (["sliding_attention", "full_attention"], {1: 0}),
        (["sliding_attention", "sliding_attention"], {0: 0, 1: 1}),
    ],
)
def test_layers_that_read_a_bounded_part_pass_through(
    make_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    kinds: list[str],
    recycled: dict[int, int],
) -> None:
    monkeypatch.setattr(make_model().config, "layer_types", kinds, raising=False)
    assert recycled_layers(make_model()) == recycled
    assert model_shape(make_model()).layers == len(recycled)
    assert n_layers(make_model()) == 2


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["full_attention", "hybrid"], r"LlamaForCausalLM has layers of type hybrid, which are neither attention to"),
        (["linear_attention", "conv"], r"no layer of LlamaForCausalLM attends to the whole context: there is nothing"),
    ],
)
def test_layers_of_another_kind_are_refused(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, kinds: list[str], sentence: str
) -> None:
    monkeypatch.setattr(make_model().config, "layer_types", kinds, raising=False)
    with pytest.raises(ValueError, match=sentence):
        model_shape(make_model(), "tiny")


def test_a_window_is_of_recycled_layers_only_where_all_have_one(make_model: Callable[..., PreTrainedModel]) -> None:
    assert window_of_recycled_layers(make_model()) is None
    assert window_of_recycled_layers(make_model("mistral", sliding_window=16)) == 16
    mixed = make_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert window_of_recycled_layers(mixed) is None
    assert recycled_layers(mixed) == {0: 0}


def test_text_may_fill_all_positions_and_no_more(make_model: Callable[..., PreTrainedModel]) -> None:
    assert max_positions(make_model()) == 256
    check_positions(make_model(), 200, 56)
    with pytest.raises(ValueError, match="200 tokens and 57 more are asked for, but the model has only 256 positions"):
        check_positions(make_model(), 200, 57)
