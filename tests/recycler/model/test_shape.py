"""What is known of a model, and which models have no cache to recycle."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from policies import ModelShape
from recycler.model.shape import check_positions, max_positions, model_shape


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_shape_is_that_of_the_config(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    assert model_shape(make_model(family), "tiny") == ModelShape("tiny", 2, 2, 4, 8)
    other = make_model(family, layers=3, query_heads=4, kv_heads=4, head_dim=16)
    assert model_shape(other, "tiny") == ModelShape("tiny", 3, 4, 4, 16)


def test_model_without_a_path_is_called_by_its_class(make_model: Callable[..., PreTrainedModel]) -> None:
    assert model_shape(make_model()).id == "LlamaForCausalLM"


def test_layers_without_a_cache_of_tokens_are_refused(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_types = ["full_attention", "linear_attention"]
    monkeypatch.setattr(make_model().config, "layer_types", layer_types, raising=False)
    with pytest.raises(ValueError, match=r"^tiny has layers of type linear_attention, which keep no KV cache\.$"):
        model_shape(make_model(), "tiny")


def test_text_may_fill_all_positions_and_no_more(make_model: Callable[..., PreTrainedModel]) -> None:
    assert max_positions(make_model()) == 256
    check_positions(make_model(), 200, 56)
    with pytest.raises(ValueError, match="200 tokens and 57 more are asked for, but the model has only 256 positions"):
        check_positions(make_model(), 200, 57)
