"""Many rows: products by torch give what products by our own kernels give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import CosineThreshold, FixedStride, NeverFull, Selection
from recycler.decode.cpu import wide
from recycler.decode.cpu.engine import CpuEngine
from recycler.measure.closed_loop import run_closed_loops

POLICIES = [FixedStride(3), CosineThreshold(0.4), NeverFull()]
SELECTION = Selection(12, sinks=2, window=4)


@pytest.mark.parametrize("model", [{"family": "qwen2", "kv_heads": 1}, {"family": "qwen3"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_by_torch_change_nothing_but_rounding(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, object],
    dtype: torch.dtype,
) -> None:
    texts = [make_tokens(40, seed=seed)[0].numpy() for seed in range(2)]
    loaded = make_model(**model, dtype=dtype)
    by_kernels = run_closed_loops(loaded, texts, 30, POLICIES, SELECTION)
    calls = []
    project = wide.project
    monkeypatch.setattr(wide, "LEAST_ROWS", 8)
    monkeypatch.setattr(wide, "project", lambda *arguments: (calls.append(1), project(*arguments)))
    by_torch = run_closed_loops(loaded, texts, 30, POLICIES, SELECTION)
    assert calls
    for one, other in zip(by_kernels, by_torch, strict=True):
        np.testing.assert_array_equal(one.full, other.full)
        np.testing.assert_allclose(one.kl, other.kl, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_few_rows_and_bfloat16_keep_to_the_kernels(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("products by torch")

    monkeypatch.setattr(wide, "project", refused)
    text = make_tokens(36)[0].numpy()
    run_closed_loops(make_model(), [text], 30, [NeverFull()] * (wide.LEAST_ROWS - 2), SELECTION)
    narrow = make_model(dtype=torch.bfloat16)
    assert isinstance(CpuEngine(narrow), CpuEngine)
    run_closed_loops(narrow, [text], 30, [NeverFull()] * wide.LEAST_ROWS, SELECTION)
