"""What a step reads of a model is what its modules hold, and memory has a rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from recycler.model.memory import read_gb_per_s, weight_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_not_the_head_is_not_read(make_model: Callable[..., PreTrainedModel], tied: bool) -> None:
    model = make_model("llama", torch.bfloat16, tie_word_embeddings=tied)
    numbers = sum(weight.numel() for weight in model.parameters())
    unread = 0 if tied else model.get_input_embeddings().weight.numel()
    assert weight_bytes(model) == 2 * (numbers - unread)


def test_of_experts_those_are_read_that_a_token_is_sent_to(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("mixtral", torch.float32, num_local_experts=4, num_experts_per_tok=1)
    numbers = {name: weight.numel() for name, weight in model.named_parameters()}
    of_experts = sum(n for name, n in numbers.items() if ".experts." in name)
    assert of_experts > 0
    unread = model.get_input_embeddings().weight.numel() + of_experts * 3 // 4
    assert weight_bytes(model) == 4 * (sum(numbers.values()) - unread)


def test_packed_weights_are_not_guessed(make_model: Callable[..., PreTrainedModel]) -> None:
    class Packed(torch.Tensor):
        """As torchao's: of another type than it says."""

    model = make_model("llama", layers=1)
    head = nn.Linear(32, 61, bias=False)
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Packed))
    kept = model.get_output_embeddings()
    model.set_output_embeddings(head)
    try:
        assert weight_bytes(model) is None
    finally:
        model.set_output_embeddings(kept)


def test_where_a_configuration_hides_what_is_read_nothing_is_said(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixtral", torch.float32, num_local_experts=4, num_experts_per_tok=1)
    assert weight_bytes(model) is not None
    with monkeypatch.context() as patch:
        # As some configurations have it, one for each layer.
        patch.setitem(vars(model.config), "num_experts_per_tok", [1, 2])
        assert weight_bytes(model) is None
    monkeypatch.setattr(model.config, "quantization_config", {"quant_method": "mxfp4"}, raising=False)
    assert weight_bytes(model) is None


def test_without_a_head_its_layers_are_read(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float32)
    whole, head = weight_bytes(model), model.get_output_embeddings().weight.nbytes
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert weight_bytes(model) == whole - head


def test_memory_is_read_at_some_rate() -> None:
    # A byte takes longer than a picosecond, and a gigabyte less than ten seconds.
    assert 0.1 < read_gb_per_s(torch.device("cpu"), n_bytes=1 << 24, n_times=2) < 1000
