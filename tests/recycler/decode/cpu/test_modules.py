"""A model's own modules around the CPU engine's attention, family by family, against the plain path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import BudgetConstrained, CosineThreshold, FixedStride, RefreshKeys, Selection, StepPolicy
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled

N_PROMPT, N_STEPS = 24, 12
SELECTION = Selection(9, 1, 3, ranking="decayed")
# Soft-capping, sinks, partial rotary embedding, fused projections, layers of experts, LayerNorms, learned positions,
# windows, chunks, a recurrence, convolutions, embeddings per layer, a text side.
FAMILIES = (
    "Gemma 2",
    "GPT-OSS",
    "Phi-3",
    "GPT-NeoX",
    "GPT-2",
    "Qwen3-MoE",
    "Gemma 4",
    "Llama 4",
    "OLMo 3",
    "Qwen3-Next (hybrid)",
    "LFM2 (hybrid)",
    "LLaVA, text side",
)
POLICIES = (
    FixedStride(3),
    RefreshKeys(FixedStride(2)),
    BudgetConstrained(CosineThreshold(0.9), 0.3),
)


@pytest.fixture(scope="module")
def make(benchmark_module: Callable[[str], Any]) -> Callable[[str], PreTrainedModel]:
    """A tiny model of a family of docs/models.md."""
    families, made = benchmark_module("models").FAMILIES, {}

    def model(name: str) -> PreTrainedModel:
        if name not in made:
            made[name] = families[name].model()
        return made[name]

    return model


def decoded(model: PreTrainedModel, policy: StepPolicy, text: Tensor, fast: bool) -> tuple[Tensor, Receipt]:
    """Logits of the steps along a text, and the receipt."""
    prompt, steps = text.split([N_PROMPT, text.shape[1] - N_PROMPT], dim=1)
    with torch.no_grad(), recycled(model, policy, SELECTION, fast=fast) as session:
        cache = model(prompt, use_cache=True).past_key_values
        logits = [model(token, past_key_values=cache).logits[:, -1] for token in steps.split(1, dim=1)]
    return torch.stack(logits), session.receipt()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_steps_as_on_the_plain_path(
    make: Callable[[str], PreTrainedModel], family: str, policy: StepPolicy
) -> None:
    model = make(family)
    text = torch.randint(1, 90, (2, N_PROMPT + N_STEPS), generator=torch.Generator().manual_seed(5))
    found, receipt = decoded(model, policy, text, fast=True)
    expected, of_plain = decoded(model, policy, text, fast=False)
    assert (receipt.engine, of_plain.engine) == ("cpu_modules", "plain")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert receipt.full_share == pytest.approx(of_plain.full_share)
    assert receipt.read_share == pytest.approx(of_plain.read_share)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Gemma 3", "Phi-3"])
def test_the_cache_is_a_cache_afterwards(make: Callable[[str], PreTrainedModel], family: str) -> None:
    model = make(family)
    text = torch.randint(1, 90, (1, N_PROMPT + 6), generator=torch.Generator().manual_seed(6))
    prompt, steps, rest = text.split([N_PROMPT, 4, 2], dim=1)
    with torch.no_grad():
        with recycled(model, FixedStride(1), SELECTION):
            cache = model(prompt, use_cache=True).past_key_values
            for token in steps.split(1, dim=1):
                model(token, past_key_values=cache)
        assert cache.get_seq_length() == N_PROMPT + 4
        after = model(rest, past_key_values=copy.deepcopy(cache)).logits
        expected = model(text).logits[:, -2:]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_padding_beside_a_window_stays_on_the_plain_path(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("Gemma 3")
    tokens = torch.randint(1, 90, (2, N_PROMPT), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    texts = {}
    for fast in (True, False):
        with recycled(model, FixedStride(3), SELECTION, fast=fast) as session:
            texts[fast] = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()
        assert session.receipt().engine == "plain"
    assert texts[True] == texts[False]


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_around_the_model_is_called_once_a_step(make: Callable[[str], PreTrainedModel], fast: bool) -> None:
    model, calls = make("Phi-3"), []
    tokens = torch.randint(1, 90, (1, N_PROMPT), generator=torch.Generator().manual_seed(8))
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with recycled(model, FixedStride(3), SELECTION, fast=fast) as session:
            model.generate(tokens, max_new_tokens=6, do_sample=False)
    finally:
        handle.remove()
    assert len(calls) == 1 + session.receipt().n_steps == 6
