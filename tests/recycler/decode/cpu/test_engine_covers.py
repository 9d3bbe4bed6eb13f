"""What the engine leaves to the plain path, and says so; and what it cannot leave any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from policies import FixedStride, Selection
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.model.loading import load_model

Make = Callable[..., Any]

SELECTION = Selection(12, sinks=2, window=4)


def generate(model: PreTrainedModel, tokens: Tensor, *, fast: bool = True, **how: Any) -> tuple[Receipt, Tensor]:
    with recycled(model, FixedStride(3), SELECTION, fast=fast) as session:
        found = model.generate(tokens, max_new_tokens=8, **how)
    return session.receipt(), found if isinstance(found, Tensor) else found.sequences


def test_a_plain_llama_is_covered(make_model: Make, make_tokens: Make) -> None:
    receipt, _ = generate(make_model(), make_tokens(20))
    assert (receipt.engine, receipt.why_plain) == ("cpu", "")


@pytest.mark.parametrize(
    ("made", "called", "why"),
    [
        (
            {"dtype": torch.float16},
            {},
            "it runs torch.float32, torch.bfloat16, torch.float64, and the model is in torch.float16",
        ),
        ({}, {"cache_implementation": "static"}, "it runs a DynamicCache, and this is a StaticCache"),
        (
            {"family": "mistral", "sliding_window": 64},
            {},
            "the cache has a DynamicSlidingWindowLayer",
        ),
        ({}, {"output_hidden_states": True}, "the call passes output_hidden_states"),
        ({"attention": "eager"}, {"output_attentions": True}, "the call passes output_attentions"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_rest_runs_plain_and_the_receipt_says_why(
    make_model: Make, make_tokens: Make, made: dict[str, Any], called: dict[str, Any], why: str
) -> None:
    model, tokens = make_model(**made), make_tokens(20)
    how = called | ({"return_dict_in_generate": True} if any(name.startswith("output") for name in called) else {})
    receipt, found = generate(model, tokens, **how)
    assert (receipt.engine, receipt.why_plain) == ("plain", why)
    assert receipt.n_steps == 7
    assert torch.equal(found, generate(model, tokens, fast=False, **how)[1])


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"hidden_act": "gelu"}, "it runs the activation silu, and this model has gelu"),
        (
            {"family": "gemma"},
            "it runs LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
            "and this is GemmaForCausalLM",
        ),
    ],
    ids=str,
)
def test_other_layers_run_as_the_models_own_around_compiled_attention(
    make_model: Make, make_tokens: Make, made: dict[str, Any], why: str
) -> None:
    model, tokens = make_model(**made), make_tokens(20)
    receipt, found = generate(model, tokens)
    assert (receipt.engine, receipt.why_plain, receipt.n_steps) == ("cpu_modules", why, 7)
    assert torch.equal(found, generate(model, tokens, fast=False)[1])


def test_hooks_that_transformers_left_behind_do_not_matter(make_model: Make, make_tokens: Make) -> None:
    model = copy.deepcopy(make_model())
    model(make_tokens(4), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert generate(model, make_tokens(20))[0].engine == "cpu"


def test_a_tokenizer_for_stop_strings_does_not_matter(byte_model: Path) -> None:
    loaded = load_model(str(byte_model), device="cpu")
    tokens = loaded.tokenizer("It was a dark and stormy night", return_tensors="pt")["input_ids"]
    how = {"tokenizer": loaded.tokenizer, "stop_strings": ["never"]}
    receipt, found = generate(loaded.model, tokens, **how)
    assert (receipt.engine, receipt.n_steps) == ("cpu", 7)
    assert torch.equal(found, generate(loaded.model, tokens, fast=False)[1])


def test_a_model_with_a_hook_runs_its_own_modules_and_the_hook_is_called(make_model: Make, make_tokens: Make) -> None:
    model, calls = make_model(), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        receipt, _ = generate(model, make_tokens(20))
    finally:
        handle.remove()
    assert (receipt.engine, receipt.why_plain) == ("cpu_modules", "model.layers.1.mlp has hooks")
    assert len(calls) == 8


def test_a_model_in_training_mode_runs_its_own_modules(make_model: Make, make_tokens: Make) -> None:
    model = make_model().train()
    try:
        receipt, _ = generate(model, make_tokens(20))
    finally:
        model.eval()
    assert (receipt.engine, receipt.why_plain) == ("cpu_modules", "the model is in training mode")


def test_a_static_cache_of_ones_own_runs_plain(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(21)
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION) as session:
        cache = StaticCache(model.config, max_cache_len=40)
        for part in tokens.split([20, 1], dim=1):
            model(part, past_key_values=cache)
    receipt = session.receipt()
    assert (receipt.engine, receipt.why_plain) == ("plain", "it runs a DynamicCache, and this is a StaticCache")
    assert receipt.n_steps == 1


def test_who_asks_for_the_plain_path_gets_it(make_model: Make, make_tokens: Make) -> None:
    receipt, _ = generate(make_model(), make_tokens(20), fast=False)
    assert (receipt.engine, receipt.why_plain) == ("plain", "fast is False")


def test_a_prompt_that_the_engine_covers_goes_on_it_after_one_that_it_does_not(
    make_model: Make, make_tokens: Make
) -> None:
    model, tokens = make_model(), make_tokens(20)
    with recycled(model, FixedStride(3), SELECTION) as session:
        model.generate(tokens, max_new_tokens=8, cache_implementation="static")
        model.generate(tokens, max_new_tokens=8)
    receipt = session.receipt()
    assert set(receipt.engine.split("+")) == {"plain", "cpu"}
    assert receipt.why_plain == "it runs a DynamicCache, and this is a StaticCache"
    assert receipt.n_steps == 14
