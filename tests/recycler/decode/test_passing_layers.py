"""Rows beside layers that pass through: a window, chunks, a convolution and a recurrence keep what is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from policies import AlwaysFull, NeverFull, Selection
from recycler import recycled
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.rows import decode_rows

N_PROMPT, N_STEPS = 20, 12
SELECTION = Selection(k=N_PROMPT + N_STEPS, sinks=1, window=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Gemma 3", "Llama 4", "LFM2 (hybrid)", "Qwen3-Next (hybrid)", "GPT-OSS"])
def test_rows_of_several_prompts_step_as_the_model_reads(benchmark_module: Callable[[str], Any], family: str) -> None:
    model: PreTrainedModel = benchmark_module("models").FAMILIES[family].model()
    texts = torch.randint(1, 96, (2, N_PROMPT + N_STEPS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = torch.cat([model(text[None]).logits for text in texts])
    prompt = ReadPrompt.side_by_side([read_prompt(model, text[:N_PROMPT], N_STEPS) for text in texts])
    for _ in range(2):
        # Policies by prompts, in turn.
        rows = decode_rows(model, prompt, [AlwaysFull(), AlwaysFull(), NeverFull(), NeverFull()], SELECTION)
        for place in range(N_PROMPT, N_PROMPT + N_STEPS):
            found = rows.step(texts[:, place].repeat(2)).logits
            torch.testing.assert_close(found, expected[:, place].repeat(2, 1), rtol=1e-3, atol=1e-3)


def test_a_model_whose_layers_do_not_all_come_by_is_refused(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    monkeypatch.setattr(model.config, "layer_types", ["full_attention"] * 3, raising=False)
    with (
        recycled(model, NeverFull(), SELECTION, fast=False),
        pytest.raises(ValueError, match=r"only 2 of the 3 layers of LlamaForCausalLM attend through transformers'"),
    ):
        model(make_tokens(N_PROMPT))
