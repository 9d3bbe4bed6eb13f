"""What is in a trace besides the measurements, and what cannot be recorded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import Selection
from recycler.prompts import Prompt
from recycler.record.one_prompt import record_trace

BY_AGE = ("recovered_mass", "query_similarity", "overlap")


def prompt_of(tokens: Tensor, n_steps: int) -> Prompt:
    return Prompt("random", "noise", tokens[0].numpy(), tokens.shape[1] - n_steps, "drawn", "CC0-1.0")


@pytest.mark.parametrize("max_age", [1, 5, 40])
def test_ages_that_do_not_exist_and_only_they_are_nan(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], max_age: int
) -> None:
    trace = record_trace(make_model(), prompt_of(make_tokens(30), 12), Selection(7, 1, 2), max_age=max_age)
    absent = np.arange(12)[:, None] - np.arange(1, max_age + 1) < -1
    for name in BY_AGE:
        assert (np.isnan(getattr(trace, name)) == absent[:, :, None, None]).all()
    assert not np.isnan(trace.fresh_mass).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_stay_within_their_range(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    prompt = prompt_of(make_tokens(60), 40)
    trace = record_trace(make_model("llama", dtype), prompt, Selection(99, 1, 2), max_age=30)
    for values in (trace.recovered_mass, trace.overlap, trace.fresh_mass):
        assert np.nanmin(values) >= 0
        assert np.nanmax(values) <= 1
    assert np.nanmax(np.abs(trace.query_similarity)) <= 1


def test_neither_memory_nor_chunks_change_a_trace(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One KV head in float64 takes 1.6 MiB.
    model, prompt = make_model(kv_heads=4, layers=1), prompt_of(make_tokens(200), 90)
    selection = Selection(9, 1, 2, ranking="updated")
    whole = record_trace(model, prompt, selection, max_age=20)
    for how in ({"memory_mib": 2}, {"memory_mib": 4}, {"chunk_tokens": 7}):
        parts = record_trace(model, prompt, selection, max_age=20, **how)
        for name in (*BY_AGE, "fresh_mass", "token_log_prob"):
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=0, atol=2e-7, err_msg=name)


def test_log_probabilities_are_those_of_the_next_tokens(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    tokens = make_tokens(30)
    trace = record_trace(make_model(), prompt_of(tokens, 12), Selection(7, 1, 2), max_age=2)
    with torch.no_grad():
        log_p = make_model()(tokens).logits[0].log_softmax(-1)
    expected = [log_p[place, tokens[0, place + 1]] for place in range(18, 29)]
    np.testing.assert_allclose(trace.token_log_prob[:-1], expected, atol=1e-6)
    assert np.isnan(trace.token_log_prob[-1])


def test_header_says_what_was_recorded(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    prompt = prompt_of(make_tokens(30), 12)
    header = record_trace(make_model(), prompt, Selection(7, 1, 2), max_age=2, model_id="tiny").header
    shape = {"id": "tiny", "layers": 2, "kv_heads": 2, "query_heads": 4, "head_dim": 8, "dtype": "float64"}
    assert header.model == shape
    assert Selection(**header.selection) == Selection(7, 1, 2)
    assert header.prompt["n_prompt_tokens"] == 18
    assert type(header).from_json(header.to_json()) == header


@pytest.mark.parametrize(
    ("model", "n_tokens", "how", "message"),
    [
        ({}, 257, {}, r"the prompt has 245 tokens and 12 more are asked for, but the model has only 256 positions"),
        ({}, 30, {"max_age": 0}, r"max_age must be at least 1 step, not 0\."),
        ({}, 256, {"memory_mib": 0}, r"needs 0 MiB for one KV head, more than the 0 MiB allowed: raise"),
        ({"family": "mistral", "sliding_window": 16}, 16, {}, "sliding window of 16 tokens"),
        ({"family": "mistral", "sliding_window": 16}, 30, {"chunk_tokens": 5}, "sliding window of 16 tokens"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_sentence(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    model: dict[str, Any],
    n_tokens: int,
    how: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        record_trace(
            make_model(**model), prompt_of(make_tokens(n_tokens), 12), Selection(7, 1, 2), **{"max_age": 2} | how
        )
