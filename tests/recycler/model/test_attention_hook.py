"""The model is as it was after the `with`, whatever happened inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from policies import FixedStride, Selection
from recycler.decode.recycled import recycled
from recycler.model.attention_hook import attention_replaced

SELECTION = Selection(8, sinks=2, window=3)


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a `with` could leave behind, in the process too."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    return {
        "config": copy.deepcopy(vars(model.config)),
        "generation_config": model.generation_config.to_dict(),
        "attributes": {
            name: {key: value for key, value in vars(module).items() if key not in ("config", "generation_config")}
            for name, module in model.named_modules()
        },
        "hooks": {name: [dict(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        "methods": (model.forward, model.generate, model._prefill),
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "parameters": {name: parameter.clone() for name, parameter in model.state_dict().items()},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    old, new = before.pop("parameters"), after.pop("parameters")
    return before == after and old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = make_model(attention=request.param)
    model._prefill  # noqa: B018
    return model


def generate(model: PreTrainedModel, tokens: Tensor) -> list[list[int]]:
    found: list[list[int]] = model.generate(tokens, max_new_tokens=12).tolist()
    return found


def test_model_is_untouched_after_the_with(model: PreTrainedModel, make_tokens: Callable[..., Tensor]) -> None:
    stock = generate(model, make_tokens(20))
    before = state(model)
    with recycled(model, FixedStride(3), SELECTION):
        assert generate(model, make_tokens(20)) != stock
        assert not same(state(model), state(model) | before)
    assert same(before, state(model))
    assert generate(model, make_tokens(20)) == stock


@pytest.mark.parametrize("where", ["in the with", "in prefill", "in a step"])
def test_model_is_untouched_after_an_exception(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], where: str
) -> None:
    stock = generate(model, make_tokens(20))
    before = state(model)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == {"in prefill": 1, "in a step": 5}.get(where):
            raise KeyboardInterrupt

    def interrupted() -> None:
        with recycled(model, FixedStride(3), SELECTION):
            handle = model.model.layers[1].register_forward_pre_hook(interrupt)
            try:
                generate(model, make_tokens(20))
            finally:
                handle.remove()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(before, state(model))
    assert generate(model, make_tokens(20)) == stock


def test_other_models_are_not_touched(
    model: PreTrainedModel, make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    other = make_model("qwen2")
    stock, stock_other = generate(model, make_tokens(20)), generate(other, make_tokens(20))
    with recycled(model, FixedStride(3), SELECTION):
        before = state(other)
        assert generate(other, make_tokens(20)) == stock_other
        with recycled(other, FixedStride(2), SELECTION):
            inner = generate(model, make_tokens(20))
            assert generate(other, make_tokens(20)) != stock_other
        assert same(before, state(other))
        assert generate(model, make_tokens(20)) == inner != stock


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa", None])
def test_other_attention_is_refused_in_one_sentence(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    model = make_model()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", name)
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"replaces 'sdpa' or 'eager' attention, and this model runs .*: load it with"),
        recycled(model, FixedStride(3), SELECTION),
    ):
        pass
    assert same(before, state(model))


def test_model_that_is_recycled_already_is_refused_and_goes_on(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor]
) -> None:
    with recycled(model, FixedStride(3), SELECTION):
        expected = generate(model, make_tokens(20))
        with pytest.raises(ValueError, match="recycled"), recycled(model, FixedStride(2), SELECTION):
            pass
        assert generate(model, make_tokens(20)) == expected


def test_model_that_keeps_its_attention_is_refused(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(model, "_can_set_attn_implementation", lambda: False)
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM does not let its attention function be replaced\."),
        recycled(model, FixedStride(3), SELECTION),
    ):
        pass
    assert same(before, state(model))


def test_argument_that_changes_what_attention_means_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    with (
        recycled(make_model(), FixedStride(3), SELECTION),
        pytest.raises(ValueError, match=r"attention with 'position_bias' \(LlamaAttention\) is not supported\."),
    ):
        make_model()(make_tokens(5), position_bias=1.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_function_is_given_the_stock_one_and_the_masks_of_the_model(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], attention: str
) -> None:
    model = make_model("llama", torch.float32, attention)
    masks = []

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            masks.append(mask)
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    tokens = make_tokens(6)
    expected = model(tokens, attention_mask=padded).logits[:, 2:]
    with attention_replaced(model, make):
        assert torch.equal(model(tokens, attention_mask=padded).logits[:, 2:], expected)
    (mask, *others) = masks
    assert len(others) == 1
    visible = mask if mask.dtype == torch.bool else mask == 0
    assert visible[0, 0, -1].tolist() == [False, False, True, True, True, True]
