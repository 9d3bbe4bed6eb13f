"""A model's own modules around the CPU engine's attention, family by family, against the plain path."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from policies import BudgetConstrained, CosineThreshold, FixedStride, RefreshKeys, Selection, StepPolicy
from recycler.decode.engine_run import NO_PLACES
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
            if getattr(made[name].config, "attn_logit_softcapping", None) is not None:
                # transformers' `sdpa` leaves it out, and says so since 5.23.
                made[name].set_attn_implementation("eager")
        return made[name]

    return model


def decoded(model: PreTrainedModel, policy: StepPolicy, text: Tensor, fast: bool) -> tuple[Tensor, Receipt]:
    """Logits of the steps along a text, and the receipt."""
    prompt, steps = text.split([N_PROMPT, text.shape[1] - N_PROMPT], dim=1)
    logits = []
    with torch.no_grad(), recycled(model, policy, SELECTION, fast=fast) as session:
        cache = model(prompt, use_cache=True).past_key_values
        for place, token in enumerate(steps.split(1, dim=1), start=N_PROMPT):
            at = torch.full_like(token, place)
            logits.append(model(token, position_ids=at, past_key_values=cache).logits[:, -1])
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
            for place, token in enumerate(steps.split(1, dim=1), start=N_PROMPT):
                model(token, position_ids=torch.full_like(token, place), past_key_values=cache)
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
        assert session.receipt().why_plain == (
            "rows with padding beside layers that pass through need a mask" if fast else "fast is False"
        )
    assert texts[True] == texts[False]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["prompt", "steps", "both"])
@pytest.mark.parametrize("family", ["Gemma", "GPT-NeoX", "GPT-2", "Gemma 3"])
def test_autocast_changes_types_and_no_numbers(make: Callable[[str], PreTrainedModel], family: str, when: str) -> None:
    model = make(family)
    text = torch.randint(1, 90, (1, N_PROMPT + 5), generator=torch.Generator().manual_seed(9))

    def run(context: Any) -> Tensor:
        with torch.no_grad(), context:
            with torch.autocast("cpu", torch.bfloat16, enabled=when != "steps"):
                cache = model(text[:, :N_PROMPT], use_cache=True).past_key_values
            with torch.autocast("cpu", torch.bfloat16, enabled=when != "prompt"):
                steps = enumerate(text[:, N_PROMPT:].split(1, dim=1), start=N_PROMPT)
                found = [
                    model(token, position_ids=torch.full_like(token, at), past_key_values=cache).logits
                    for at, token in steps
                ]
        return torch.cat(found).float()

    stock = run(nullcontext())
    found = run(recycled(model, FixedStride(1), SELECTION))
    # Autocast rounds products to bfloat16, and those of attention are not the engine's to round.
    torch.testing.assert_close(found, stock, rtol=0, atol=0.1 * float(stock.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_layers_that_share_tokens_take_the_plain_path(make: Callable[[str], PreTrainedModel]) -> None:
    config = copy.deepcopy(make("Gemma 4").config)
    config.num_kv_shared_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, 90, (1, N_PROMPT), generator=torch.Generator().manual_seed(8))
    how = {"max_new_tokens": 6, "do_sample": False}
    with recycled(model, FixedStride(1), SELECTION) as session:
        assert torch.equal(model.generate(tokens, **how), model.generate(tokens, **how))
        receipt = session.receipt()
    assert (receipt.engine, receipt.why_plain) == ("plain", "a layer attends to the tokens of another one")


def test_a_model_that_is_not_told_positions_counts_them_itself(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("Phi-3")
    text = torch.randint(1, 90, (1, N_PROMPT + 2), generator=torch.Generator().manual_seed(9))
    for fast, why in ((True, NO_PLACES), (False, "fast is False")):
        with torch.no_grad(), recycled(model, FixedStride(3), SELECTION, fast=fast) as session:
            cache = model(text[:, :N_PROMPT], use_cache=True).past_key_values
            model(text[:, N_PROMPT : N_PROMPT + 1], past_key_values=cache)
        assert (session.receipt().engine, session.receipt().why_plain) == ("plain", why)
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION):
        cache = model(text[:, :N_PROMPT], use_cache=True).past_key_values
        model(text[:, N_PROMPT : N_PROMPT + 1], position_ids=torch.tensor([[N_PROMPT]]), past_key_values=cache)
        with pytest.raises(ValueError, match="the call passes no position_ids"):
            model(text[:, N_PROMPT + 1 :], past_key_values=cache)


def test_logits_may_be_written_to(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("Phi-3")
    text = torch.randint(1, 90, (1, N_PROMPT + 1), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION) as session:
        cache = model(text[:, :N_PROMPT], use_cache=True).past_key_values
        out = model(text[:, N_PROMPT:], position_ids=torch.tensor([[N_PROMPT]]), past_key_values=cache)
        out.logits[:, -1, 3] = -1
    assert session.receipt().engine == "cpu_modules"


def test_a_hook_may_wait_for_somebody_who_decodes_too(make: Callable[[str], PreTrainedModel]) -> None:
    waiting, other = make("Phi-3"), make("Gemma")
    tokens = torch.randint(1, 90, (1, N_PROMPT), generator=torch.Generator().manual_seed(8))
    how = {"max_new_tokens": 3, "do_sample": False}
    done: list[bool] = []

    def decode_other(*_: Any) -> None:
        def decode() -> None:
            with recycled(other, FixedStride(3), SELECTION):
                other.generate(tokens, **how)

        thread = threading.Thread(target=decode)
        thread.start()
        thread.join(timeout=120)
        done.append(not thread.is_alive())

    handle = waiting.model.layers[1].register_forward_hook(decode_other)
    try:
        with recycled(waiting, FixedStride(3), SELECTION):
            waiting.generate(tokens, **how)
    finally:
        handle.remove()
    assert done == [True] * 3


def test_what_a_config_asks_for_beside_logits_is_given(make: Callable[[str], PreTrainedModel]) -> None:
    model = copy.deepcopy(make("Phi-3"))
    model.config.output_hidden_states = True
    text = torch.randint(1, 90, (1, N_PROMPT + 1), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION) as session:
        cache = model(text[:, :N_PROMPT], use_cache=True).past_key_values
        out = model(text[:, N_PROMPT:], position_ids=torch.tensor([[N_PROMPT]]), past_key_values=cache)
    assert out.hidden_states is not None
    assert session.receipt().why_plain == "the model's config asks for output_hidden_states"


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
