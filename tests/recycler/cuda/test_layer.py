"""The torch parts of a layer: those of the model's own modules, in one graph without breaks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.cuda.layer import LayerMath, layer_weights, with_code_of_its_own
from recycler.model_weights import decoder_parts

Make = Callable[..., Any]


def stock_parts(model: PreTrainedModel, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value heads of the first layer, `(rows, heads, head_dim)`, and its output with a cache of them."""
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    attention = layer.self_attn
    angles = model.model.rotary_emb(x[:, None], places[:, None])

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(name, output)

    handles = [attention.v_proj.register_forward_hook(keep("value"))]
    handles.append(
        attention.o_proj.register_forward_pre_hook(lambda module, args: seen.__setitem__("attended", args[0]))
    )
    output = layer(x[:, None], position_embeddings=angles)
    for handle in handles:
        handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    return seen["value"][:, 0], seen["attended"][:, 0], output.view(len(x), -1), x


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_layer_is_that_of_the_model(
    make_model: Make, family: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch.compile makes of it, without a compiler behind; it fails at a graph break.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model = make_model(family, head_dim=16, dtype=torch.float32)
    parts = decoder_parts(model)
    math, weights = LayerMath(parts, compiles), layer_weights(parts.layers[0])
    generator = torch.Generator().manual_seed(0)
    x, places = torch.randn((3, 32), generator=generator), torch.tensor([4, 9, 70])
    with torch.no_grad():
        value, attended, output, _ = stock_parts(model, x, places)
        query, key, own_value = math.project(x, weights, *parts.rotary(x, places[:, None]))
        torch.testing.assert_close(own_value.flatten(1), value)
        # A token that sees itself alone attends to its own value, whatever query and key are.
        torch.testing.assert_close(math.feed(x, attended, weights), output)
        logits = model.lm_head(model.model.norm(x))
        torch.testing.assert_close(math.predict(x), logits)
    assert query.shape == (3, 4, 16)
    assert key.shape == (3, 2, 16)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_queries_and_keys_are_rotated_as_in_the_model(make_model: Make, family: str) -> None:
    model = make_model(family, head_dim=16, dtype=torch.float32)
    parts = decoder_parts(model)
    math, weights = LayerMath(parts, False), layer_weights(parts.layers[0])
    tokens, places = torch.tensor([5, 11]), torch.tensor([7, 40])
    with torch.no_grad():
        x = parts.embedding.weight[tokens]
        _, key, value = math.project(x, weights, *parts.rotary(x, places[:, None]))
        cache = model(tokens[:, None], position_ids=places[:, None], use_cache=True).past_key_values
    torch.testing.assert_close(key, cache.layers[0].keys[:, :, 0])
    torch.testing.assert_close(value, cache.layers[0].values[:, :, 0])


def test_models_of_other_shapes_do_not_use_up_each_others_compilations(make_model: Make) -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    one, same, other = (with_code_of_its_own(double, key) for key in ("a", "a", "b"))
    assert one.__code__ is same.__code__
    assert one.__code__ is not other.__code__
    # By identity: Python calls equal code equal, and torch counts by the object.
    assert other(torch.ones(1)).item() == 2
