"""What the GPU engine leaves to the plain path, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from policies import FixedStride, Selection
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.decode.engines import engine_for
from recycler.decode.recycled import recycled
from recycler.model.decoder_parts import NotCovered

Make = Callable[..., Any]


def test_a_model_on_the_cpu_is_left_to_the_cpu_engine(make_model: Make) -> None:
    with pytest.raises(NotCovered, match=r"^it runs on cuda, and the model is on cpu$"):
        CudaEngine(make_model(head_dim=16, dtype=torch.float32))
    assert engine_for(make_model()).name == "cpu"


@pytest.mark.parametrize(
    ("made", "selection", "why"),
    [
        (
            {"dtype": torch.float64},
            Selection(40),
            "it runs torch.float32, torch.bfloat16, torch.float16, and the model is",
        ),
        ({"head_dim": 8}, Selection(40), "it runs heads of 16, 32, 64, 128 or 256 numbers, and this model's have 8"),
        ({"head_dim": 24}, Selection(40), "it runs heads of 16, 32, 64, 128 or 256 numbers, and this model's have 24"),
        (
            {},
            Selection(40, group="layer_mean"),
            "it pools scores over the heads of a KV group, and the selection over those of a layer",
        ),
        ({"hidden_act": "gelu"}, Selection(40), "it runs the activation silu, and this model has gelu"),
    ],
    ids=["float64", "small heads", "odd heads", "layer mean", "activation"],
)
def test_the_rest_runs_plain_and_the_receipt_says_why(
    make_model: Make,
    make_tokens: Make,
    on_engine: Make,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    made: dict[str, Any],
    selection: Selection,
    why: str,
) -> None:
    model = make_model(**({"head_dim": 16, "dtype": torch.float32} | made)).to(device)
    on_engine()
    with recycled(model, FixedStride(3), selection) as session:
        model.generate(make_tokens(20).to(device), max_new_tokens=5, do_sample=False)
    model.to("cpu")
    receipt = session.receipt()
    assert receipt.engine == "plain"
    assert receipt.why_plain.startswith(why)


def test_a_rotary_embedding_that_looks_at_positions_is_refused(
    make_model: Make, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(head_dim=16, dtype=torch.float32)
    monkeypatch.setattr(model.model.rotary_emb, "rope_type", "dynamic")
    with pytest.raises(NotCovered, match=r"^the model's rotary embedding \(dynamic\) changes with the positions$"):
        CudaEngine(model, machine)


def test_padding_that_changes_is_noticed_before_anything_is_told(
    make_model: Make, make_tokens: Make, on_engine: Make, device: torch.device
) -> None:
    model, tokens = make_model(head_dim=16, dtype=torch.float32).to(device), make_tokens(20, rows=2).to(device)
    mask = torch.ones((2, 21), dtype=torch.int64, device=device)
    mask[1, 3] = 0
    on_engine()

    def decode() -> None:
        with torch.no_grad(), recycled(model, FixedStride(3), Selection(12, 2, 4)):
            cache = model(tokens, attention_mask=torch.ones_like(tokens)).past_key_values
            model(tokens[:, :1], attention_mask=mask, past_key_values=cache)

    with pytest.raises(ValueError, match=r"^row 1 of the batch has masked tokens after its first visible one"):
        decode()
    model.to("cpu")
