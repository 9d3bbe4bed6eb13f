"""What stands around a model or inside of it: it is recycled with the same tokens, or refused, and never left out."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, pipeline

from policies import FixedStride, NeverFull, Selection
from recycler.decode.asked import model_of
from recycler.decode.recycled import recycled
from recycler.decode.session_sentences import MODEL_CHANGED

# What PEFT 0.21 says of transformers 5.23.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:Unsupported layer type:UserWarning"
)

SELECTION = Selection(12, sinks=2, window=4)
N_NEW = 10
LORA = LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LORA,
    "lora of embeddings": LoraConfig(target_modules=["embed_tokens"], r=4),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return copy.deepcopy(make_model("llama"))


@pytest.fixture
def tokens(make_tokens: Callable[..., Tensor]) -> Tensor:
    return make_tokens(30)


@pytest.fixture(params=[True, False], ids=["engine", "plain"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def generated(model: Any, tokens: Tensor) -> list[int]:
    mask = torch.ones_like(tokens)
    found = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False)
    new: list[int] = found[0, tokens.shape[1] :].tolist()
    return new


def called(model: Any, tokens: Tensor, after: Callable[[], Any] = lambda: None, at: int = 0) -> list[int]:
    """Greedy decoding by calls of the model itself; `after` runs before the call `at`, of which 0 reads the prompt."""
    new: list[int] = []
    cache = None
    with torch.no_grad():
        for step in range(N_NEW):
            if step == at:
                after()
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            new.append(int(tokens))
    return new


def randomised(model: nn.Module) -> nn.Module:
    """Adapters that change what is written."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "ln_tuning_")):
            weight.data = 0.5 * torch.randn_like(weight)
    return model.eval()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("write", [generated, called])
def test_a_compiled_model_is_recycled_by_either_of_its_names(
    model: PreTrainedModel, tokens: Tensor, fast: bool, in_place: bool, write: Callable[..., list[int]]
) -> None:
    stock = write(model, tokens)
    with recycled(model, NeverFull(), SELECTION):
        expected = write(model, tokens)
    assert expected != stock
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    # Once before: what was traced then must not run inside.
    assert write(compiled, tokens) == stock
    for name in (compiled, model):
        with recycled(compiled, NeverFull(), SELECTION, fast=fast) as session:
            assert write(name, tokens) == expected
        assert session.receipt().n_steps == N_NEW - 1
    with recycled(compiled, FixedStride(1), SELECTION, fast=fast):
        assert write(compiled, tokens) == stock
    assert write(compiled, tokens) == stock


@pytest.mark.usefixtures("_compiler")
def test_a_model_compiled_as_one_graph_raises(model: PreTrainedModel, tokens: Tensor) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    stock = called(compiled, tokens)
    with pytest.raises(RuntimeError, match="fullgraph=True found no"), recycled(compiled, FixedStride(3), SELECTION):
        called(compiled, tokens)
    assert called(compiled, tokens) == stock


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("write", [generated, called])
def test_adapters_in_layers_are_recycled_as_their_merged_weights_are(
    model: PreTrainedModel, tokens: Tensor, adapter: str, write: Callable[..., list[int]]
) -> None:
    without = write(model, tokens)
    peft_model = randomised(get_peft_model(model, copy.deepcopy(ADAPTERS[adapter])))
    stock = write(peft_model, tokens)
    assert stock != without
    merged = copy.deepcopy(peft_model).merge_and_unload()
    with recycled(merged, NeverFull(), SELECTION) as session:
        expected = write(merged, tokens)
    assert session.receipt().engine == "cpu"
    for name in (peft_model, peft_model.get_base_model()):
        with recycled(peft_model, NeverFull(), SELECTION) as session:
            assert write(name, tokens) == expected
        receipt = session.receipt()
        assert (receipt.engine, receipt.n_steps) == ("cpu_modules", N_NEW - 1)
        assert " is a peft.tuners." in receipt.why_plain
    with recycled(peft_model, FixedStride(1), SELECTION):
        assert write(peft_model, tokens) == stock
    with recycled(peft_model, NeverFull(), SELECTION) as session, peft_model.disable_adapter():
        never = write(peft_model, tokens)
    with recycled(copy.deepcopy(peft_model).unload(), NeverFull(), SELECTION) as bare:
        assert write(bare._model, tokens) == never
    assert write(peft_model, tokens) == stock


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_learned_prompt_is_refused(model: PreTrainedModel, kind: type[PeftConfig]) -> None:
    peft_model = get_peft_model(model, kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"'default' is a learned prompt \(P\w+_TUNING\)"):
        model_of(peft_model)


def test_wrappers_of_wrappers_are_the_model_inside(model: PreTrainedModel) -> None:
    peft_model = get_peft_model(model, LORA)
    assert model_of(torch.compile(peft_model, backend="eager")) is model


def adapt(model: PreTrainedModel) -> None:
    inject_adapter_in_model(LORA, model)
    randomised(model)


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: -output)


def accelerate_hook(model: PreTrainedModel) -> None:
    class Negate(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return -output

    add_hook_to_module(model.model.layers[1].mlp, Negate())


def other_weights(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = -weight.data


def other_parameter(model: PreTrainedModel) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(-norm.weight.detach())


CHANGES = [adapt, hook, accelerate_hook, other_weights, other_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_before_a_prompt_counts(
    model: PreTrainedModel, tokens: Tensor, change: Callable[[PreTrainedModel], None]
) -> None:
    changed = copy.deepcopy(model)
    change(changed)
    with recycled(changed, NeverFull(), SELECTION, fast=False):
        expected = called(changed, tokens)
    with recycled(model, NeverFull(), SELECTION) as session:
        before = called(model, tokens)
        assert session.receipt().engine == "cpu"
        assert called(model, tokens, lambda: change(model)) == expected
    assert expected != before
    receipt = session.turns()[1]
    weights_only = change in (other_weights, other_parameter)
    assert receipt.engine == ("cpu" if weights_only else "cpu_modules")
    assert bool(receipt.why_plain) != weights_only


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_a_prompt_counts_or_is_refused_before_the_next_token(
    model: PreTrainedModel, tokens: Tensor, change: Callable[[PreTrainedModel], None], at: int
) -> None:
    twin = copy.deepcopy(model)
    with recycled(twin, NeverFull(), SELECTION, fast=False):
        expected = called(twin, tokens, lambda: change(twin), at)
    with recycled(model, NeverFull(), SELECTION):
        if at == 1:
            assert called(model, tokens, lambda: change(model), at) == expected
        else:
            with pytest.raises(ValueError, match="the model changed after its prompt was read") as refused:
                called(model, tokens, lambda: change(model), at)
            assert str(refused.value) == MODEL_CHANGED


@pytest.mark.parametrize("outer", [False, True])
def test_hooks_of_accelerate_are_called_at_every_step(model: PreTrainedModel, tokens: Tensor, outer: bool) -> None:
    calls = []

    class Count(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    with recycled(model, NeverFull(), SELECTION):
        expected = generated(model, tokens)
    add_hook_to_module(model if outer else model.model.layers[0].self_attn.q_proj, Count())
    for write in (generated, called):
        calls.clear()
        with recycled(model, NeverFull(), SELECTION) as session:
            assert write(model, tokens) == expected
        receipt = session.receipt()
        where = "the model" if outer else "model.layers.0.self_attn.q_proj"
        assert (receipt.engine, receipt.why_plain) == ("cpu_modules", f"{where} has hooks")
        assert len(calls) == receipt.n_steps + 1 == N_NEW
    with recycled(model, NeverFull(), SELECTION) as session:
        if outer:
            # What is taken off the model's forward takes ours off too.
            with pytest.raises(ValueError, match="a decode step did not come through the model's forward"):
                called(model, tokens, lambda: remove_hook_from_module(model, recurse=True), at=4)
            return
        assert called(model, tokens, lambda: remove_hook_from_module(model, recurse=True), at=4) == expected
    assert session.receipt().n_steps == N_NEW - 1


def test_weights_that_accelerate_brings_at_every_call_are_recycled(model: PreTrainedModel, tokens: Tensor) -> None:
    stock = generated(model, tokens)
    with recycled(model, NeverFull(), SELECTION):
        expected = generated(model, tokens)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    with recycled(model, NeverFull(), SELECTION) as session:
        assert generated(model, tokens) == expected
    assert session.receipt().n_steps == N_NEW - 1
    with recycled(model, FixedStride(1), SELECTION):
        assert generated(model, tokens) == stock


class OtherLinear(nn.Linear):
    """As of a library of quantized layers."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OtherTensor(Tensor):
    """As of a library of packed weights."""


def subclass(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp.up_proj.__class__ = OtherLinear
    return model


def packed(model: PreTrainedModel) -> PreTrainedModel:
    linear = model.model.layers[0].mlp.up_proj
    weight = linear.weight.detach().as_subclass(OtherTensor)
    linear.weight = nn.Parameter(weight)
    return model


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (subclass, r"model\.layers\.0\.mlp\.up_proj is a .*OtherLinear"),
        (packed, "a weight is a OtherTensor, not a Parameter"),
        (quantized, r"model\.layers\.0\.self_attn\.q_proj is a torch\.ao\.nn\.quantized\.dynamic\.modules\.linear"),
    ],
)
def test_layers_that_are_no_plain_linears_are_the_models_own_business(
    model: PreTrainedModel, tokens: Tensor, change: Callable[[PreTrainedModel], PreTrainedModel], why: str
) -> None:
    changed = change(model)
    stock = generated(changed, tokens)
    with recycled(changed, FixedStride(1), SELECTION) as session:
        assert generated(changed, tokens) == stock
    receipt = session.receipt()
    assert receipt.engine == "cpu_modules"
    assert re.match(why, receipt.why_plain)


def test_a_session_beside_another_has_the_engine_too(model: PreTrainedModel, tokens: Tensor) -> None:
    engines = []

    def other() -> None:
        with recycled(model, NeverFull(), SELECTION) as session:
            generated(model, tokens)
        engines.append(session.receipt().engine)

    with recycled(model, NeverFull(), SELECTION):
        generated(model, tokens)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert engines == ["cpu"]


def test_a_pipeline_of_an_adapted_model_is_the_model_inside(byte_model: Any) -> None:
    writer = pipeline("text-generation", model=str(byte_model), device="cpu")
    inside = writer.model
    writer.model = get_peft_model(inside, LORA)
    assert model_of(writer) is inside
