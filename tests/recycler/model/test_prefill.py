"""A prompt in chunks leaves the cache of the whole prompt."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.model.prefill import chunk_sizes, prefill


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 21, 22, 4096])
def test_chunks_leave_the_cache_of_the_whole_prompt(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], family: str, chunk_tokens: int
) -> None:
    model, tokens = make_model(family), make_tokens(21)
    with torch.no_grad():
        expected = model(tokens).past_key_values
    cache = prefill(model, tokens, chunk_tokens)
    assert cache.get_seq_length() == 21
    for found, whole in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(found.keys, whole.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n_tokens", "chunk_tokens", "on_gpu", "sizes"),
    [
        (1, None, False, [1]),
        (5000, None, False, [2048, 2048, 904]),
        (4096, None, False, [2048, 2048]),
        (32_768, None, True, [32_768]),
        (35_000, None, True, [32_768, 2048, 184]),
        (100, None, True, [100]),
        (5000, 4000, True, [4000, 1000]),
        (5000, 4000, False, [4000, 1000]),
    ],
)
def test_only_the_first_chunk_on_a_gpu_is_larger_and_only_where_no_size_is_asked_for(
    n_tokens: int, chunk_tokens: int | None, on_gpu: bool, sizes: list[int]
) -> None:
    assert chunk_sizes(n_tokens, chunk_tokens, on_gpu) == sizes


@pytest.mark.parametrize("chunk_tokens", [0, -3])
def test_chunks_of_no_tokens_are_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], chunk_tokens: int
) -> None:
    with pytest.raises(ValueError, match=rf"^chunk_tokens must be at least 1, not {chunk_tokens}\.$"):
        prefill(make_model(), make_tokens(5), chunk_tokens)


def test_decoding_goes_on_from_the_cache(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(21)
    cache = prefill(model, tokens[:, :20], 6)
    with torch.inference_mode():
        logits = model(tokens[:, 20:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, model(tokens).logits[:, -1], rtol=0, atol=1e-12)


def test_prompt_is_not_kept_for_gradients(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    layer = prefill(make_model(), make_tokens(5)).layers[0]
    assert not layer.keys.requires_grad
