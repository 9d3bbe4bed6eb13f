"""Models whose linear layers torchao quantized: `make test-torchao`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from policies import AlwaysFull, FixedStride, PolicyFile, Selection, StepPolicy
from recycler import recycled
from recycler.decode.receipt import Receipt
from recycler.model.shape import model_shape
from recycler.model.weights_digest import weights_sample

quantization = pytest.importorskip("torchao.quantization", reason="make test-torchao installs what this needs")

SELECTION = Selection(12, sinks=2, window=4)
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, vocab_size=97, **sizes)).eval()


@pytest.fixture(params=["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def config(request: pytest.FixtureRequest) -> Any:
    return getattr(quantization, request.param)()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(plain: PreTrainedModel, config: Any, request: pytest.FixtureRequest) -> PreTrainedModel:
    quantized = copy.deepcopy(plain).to(request.param)
    quantization.quantize_(quantized, config)
    return quantized


def written(model: PreTrainedModel, policy: StepPolicy | None, **options: Any) -> tuple[Tensor, Receipt | None]:
    tokens, mask = torch.arange(1, 61).reshape(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :5] = 0
    if policy is None:
        return model.generate(tokens, attention_mask=mask, **GREEDY), None
    with recycled(model, policy, SELECTION, **options) as session:
        found = model.generate(tokens, attention_mask=mask, **GREEDY)
    return found, session.receipt()


def test_always_full_is_stock_on_compiled_attention(model: PreTrainedModel) -> None:
    stock, _ = written(model, None)
    found, receipt = written(model, AlwaysFull())
    assert torch.equal(found, stock)
    assert receipt is not None
    assert receipt.engine == "cpu_modules"
    assert receipt.why_plain == "a weight is a Int8Tensor, not a Parameter"


def test_recycled_steps_are_those_of_the_plain_path(model: PreTrainedModel) -> None:
    found, receipt = written(model, FixedStride(4))
    expected, _ = written(model, FixedStride(4), fast=False)
    assert torch.equal(found, expected)
    assert receipt is not None
    assert receipt.full_share < 0.3


def test_exact_decoding_is_stock(model: PreTrainedModel) -> None:
    stock, _ = written(model, None)
    found, receipt = written(model, FixedStride(4), exact=True)
    assert torch.equal(found, stock)
    assert receipt is not None
    assert receipt.rounds is not None


def test_audits_measure_them(model: PreTrainedModel) -> None:
    _, receipt = written(model, FixedStride(4), audit=5)
    assert receipt is not None
    assert receipt.audit is not None
    assert receipt.audit["row_steps"] == 20


def test_a_model_that_transformers_quantizes_as_it_loads_it_is_recycled_and_its_weights_are_not_compared(
    plain: PreTrainedModel, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path)
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32).eval()
    file = PolicyFile(AlwaysFull(), SELECTION, model_shape(plain), {"weights": weights_sample(plain)})
    stock, _ = written(model, None)
    with pytest.warns(UserWarning, match="are packed, and could not be compared"), recycled(model, file) as session:
        found = model.generate(torch.arange(1, 61).reshape(2, 30), attention_mask=torch.ones(2, 30).long(), **GREEDY)
    assert found.shape == stock.shape
    assert len(session.receipt().notes) == 1
