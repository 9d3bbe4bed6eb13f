"""The torch parts of a layer: those of the model's own modules, in one graph without breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from transformers import PreTrainedModel

from recycler.decode.cuda.dense import LayerMath, last_weights, layer_weights, stacked, with_code_of_its_own
from recycler.model.decoder_parts import NotCovered, decoder_parts

Make = Callable[..., Any]


def stock_layer(model: PreTrainedModel, layer: Any, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's values `(rows, heads * head_dim)`, the attention of tokens that see only themselves, and its output."""
    seen: dict[str, Tensor] = {}
    attention = layer.self_attn
    angles = model.model.rotary_emb(x[:, None], places[:, None])
    handles = [
        attention.v_proj.register_forward_hook(lambda module, args, output: seen.__setitem__("value", output)),
        attention.o_proj.register_forward_pre_hook(lambda module, args: seen.__setitem__("attended", args[0])),
    ]
    output = layer(x[:, None], position_embeddings=angles)
    for handle in handles:
        handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    return seen["value"][:, 0], seen["attended"][:, 0], output.view(len(x), -1)


@pytest.fixture
def compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """`torch.compile` traces functions, fails at graph breaks, and runs what it has traced; counts what it traced."""
    counter, stock = CompileCounterWithBackend("aot_eager"), torch.compile

    def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        return stock(function, backend=counter, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compiled)
    return counter


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.usefixtures("compile_without_a_compiler")
def test_layers_are_those_of_the_model(make_model: Make, family: str, compiles: bool) -> None:
    model = make_model(family, head_dim=16, dtype=torch.float32)
    parts = decoder_parts(model)
    x, places = torch.randn((3, 32), generator=torch.Generator().manual_seed(0)), torch.tensor([4, 9, 70])
    with torch.no_grad():
        stock = []
        for layer in model.model.layers[:2]:
            value, attended, output = stock_layer(model, layer, stock[-1][2] if stock else x, places)
            stock.append((value, attended, output))
        math, weights = LayerMath(parts, 3, compiles), [layer_weights(layer) for layer in parts.layers[:2]]
        angles = parts.rotary(x, places[:, None])
        query, key, value = math.enter(x, weights[0], *angles)
        torch.testing.assert_close(value.flatten(1), stock[0][0])
        # A token that sees itself alone attends to its own value, whatever query and key are.
        after, next_query, next_key, next_value = math.cross(x, stock[0][1], *weights, *angles)
        torch.testing.assert_close(after, stock[0][2])
        torch.testing.assert_close(next_value.flatten(1), stock[1][0])
        for mine, again in zip((next_query, next_key), math.enter(after, weights[1], *angles), strict=False):
            torch.testing.assert_close(mine, again)
        logits = math.leave(after, stock[1][1], weights[1], last_weights(parts))
        torch.testing.assert_close(logits, model.lm_head(model.model.norm(stock[1][2])))
    assert query.shape == (3, 4, 16)
    assert key.shape == (3, 2, 16)
    assert all(part.is_contiguous() for part in (query, key, value, next_query, next_key, next_value))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_queries_and_keys_are_rotated_as_in_the_model(make_model: Make, family: str) -> None:
    model = make_model(family, head_dim=16, dtype=torch.float32)
    parts = decoder_parts(model)
    math, weights = LayerMath(parts, 2, False), layer_weights(parts.layers[0])
    tokens, places = torch.tensor([5, 11]), torch.tensor([7, 40])
    with torch.no_grad():
        x = parts.embedding.weight[tokens]
        _, key, value = math.enter(x, weights, *parts.rotary(x, places[:, None]))
        cache = model(tokens[:, None], position_ids=places[:, None], use_cache=True).past_key_values
    torch.testing.assert_close(key, cache.layers[0].keys[:, :, 0])
    torch.testing.assert_close(value, cache.layers[0].values[:, :, 0])


def test_all_layers_and_runs_share_what_was_compiled_and_every_number_of_rows_has_its_own(
    make_model: Make, compile_without_a_compiler: CompileCounterWithBackend
) -> None:
    parts = decoder_parts(make_model(head_dim=16, dtype=torch.float32))
    counts = []
    for rows in (1, 1, 2, 5, 2):
        weights = [layer_weights(layer) for layer in parts.layers]
        math, x = LayerMath(parts, rows, True), torch.zeros((rows, 32))
        with torch.inference_mode():
            angles = parts.rotary(x, torch.zeros((rows, 1), dtype=torch.int64))
            query, _, _ = math.enter(x, weights[0], *angles)
            for layer in range(1, len(weights)):
                x, query, _, _ = math.cross(x, query.flatten(1), weights[layer - 1], weights[layer], *angles)
            math.leave(x, query.flatten(1), weights[-1], last_weights(parts))
        counts.append(compile_without_a_compiler.frame_count)
    assert counts == [3, 3, 6, 9, 9]


class TestStacked:
    """Weights of several layers in one matrix, which are still those of the layers."""

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_the_layers_weights_are_parts_of_it(self, bias: bool, mode: Callable[[], Any]) -> None:
        layers = [nn.Linear(5, n, bias=bias) for n in (4, 2, 3)]
        before = [copy.deepcopy(layer.state_dict()) for layer in layers]
        x = torch.randn(2, 5)
        with mode():
            weight, weights_bias = stacked(layers)
        assert weight.shape == (9, 5)
        torch.testing.assert_close(linear(x, weight, weights_bias), torch.cat([layer(x) for layer in layers], 1))
        for layer, state in zip(layers, before, strict=True):
            assert_equal_states(layer.state_dict(), state)
            assert layer.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        # They can still be trained, and what they learn is there.
        torch.cat([layer(x) for layer in layers], 1).sum().backward()
        with torch.no_grad():
            layers[1].weight.sub_(layers[1].weight.grad)
        assert torch.equal(weight[4:6], layers[1].weight)

    def test_stacked_weights_are_not_copied_again(self) -> None:
        layers = [nn.Linear(5, n) for n in (4, 2, 3)]
        (weight, bias), (same, same_bias) = stacked(layers), stacked(layers)
        assert (weight.data_ptr(), bias.data_ptr()) == (same.data_ptr(), same_bias.data_ptr())
        assert torch.equal(weight, same)
        layers[1].weight.data = layers[1].weight.data.clone()
        assert torch.equal(stacked(layers)[0], weight)

    def test_some_biases_are_refused(self) -> None:
        layers = [nn.Linear(5, 4), nn.Linear(5, 2, bias=False), nn.Linear(5, 2)]
        with pytest.raises(NotCovered, match="some of the projections to queries, keys and values have biases"):
            stacked(layers)

    def test_a_model_with_stacked_weights_can_be_saved_and_copied(self, make_model: Make, tmp_path: Path) -> None:
        model = copy.deepcopy(make_model("qwen2", head_dim=16, dtype=torch.float32))
        before = copy.deepcopy(model.state_dict())
        for layer in model.model.layers:
            layer_weights(layer)
        assert_equal_states(model.state_dict(), before)
        model.save_pretrained(tmp_path)
        assert_equal_states(type(model).from_pretrained(tmp_path).state_dict(), before)
        copied = copy.deepcopy(model).to(torch.float64)
        assert copied.model.layers[0].self_attn.k_proj.weight.dtype == torch.float64
        assert_equal_states(model.state_dict(), before)


def assert_equal_states(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_models_of_other_shapes_do_not_use_up_each_others_compilations(make_model: Make) -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    one, same, other = (with_code_of_its_own(double, key) for key in ("a", "a", "b"))
    assert one.__code__ is same.__code__
    assert one.__code__ is not other.__code__
    # By identity: Python calls equal code equal, and torch counts by the object.
    assert other(torch.ones(1)).item() == 2
