"""What cannot run recycled says so in one sentence instead of giving other tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from policies import CosineThreshold, FixedStride, NeverFull, Selection
from recycler.decode.recycled import recycled

SELECTION = Selection(8, sinks=2, window=3)
CACHE_CHANGED = r"^the KV cache changed between two decode steps .*; use greedy search or sampling\.$"


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


def prefilled(model: PreTrainedModel, tokens: Tensor, n_steps: int = 3) -> Cache:
    """A cache some steps into decoding."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    for _ in range(n_steps):
        model(tokens[:, :1], past_key_values=cache)
    return cache


def test_beam_search_is_refused(make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]) -> None:
    with recycled(make_model(), FixedStride(3), SELECTION), pytest.raises(ValueError, match=CACHE_CHANGED):
        make_model().generate(make_tokens(20), num_beams=4, max_new_tokens=20)


def test_sizes_for_another_model_are_refused_with_both_shapes(make_model: Callable[..., PreTrainedModel]) -> None:
    selection = Selection(8, sinks=2, window=3, unit_k=((8, 8, 8),))
    refusal = pytest.raises(ValueError, match=r"the selection is for 1 layers x 3 KV heads, but .* has 2 layers x 2 KV")
    with refusal, recycled(make_model(), FixedStride(3), selection):
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(-2),
        lambda cache: cache.crop(-22),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([0, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: [setattr(layer, "keys", 2 * layer.keys) for layer in cache.layers],
        lambda cache: [setattr(layer, "keys", 0 * layer.keys) for layer in cache.layers],
    ],
)
def test_cache_that_does_anything_but_grow_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], change: Callable[[Any], Any]
) -> None:
    model = make_model()
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION):
        cache = prefilled(model, make_tokens(20, rows=2))
        change(cache)
        with pytest.raises(ValueError, match=CACHE_CHANGED):
            model(make_tokens(1, rows=cache.layers[0].keys.shape[0]), past_key_values=cache)


@pytest.mark.parametrize("other", [lambda model: DynamicCache(config=model.config), lambda _: None])
def test_another_cache_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], other: Callable[..., Any]
) -> None:
    model = make_model()
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION):
        prefilled(model, make_tokens(20))
        with pytest.raises(ValueError, match=CACHE_CHANGED):
            model(make_tokens(1), past_key_values=other(model))


def test_two_decodings_in_turns_are_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model = make_model()
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION):
        first, second = (prefilled(model, make_tokens(20, seed=seed)) for seed in (1, 2))
        model(make_tokens(1), past_key_values=second)
        with pytest.raises(ValueError, match=CACHE_CHANGED):
            model(make_tokens(1), past_key_values=first)


@pytest.mark.parametrize("policy", [FixedStride(((2, 3, 4), (1, 1, 1))), CosineThreshold(((0.5, 0.5),))])
def test_policy_for_another_model_is_refused_with_both_shapes(
    make_model: Callable[..., PreTrainedModel], policy: Any
) -> None:
    (shape,) = policy.unit_shapes()
    message = f"the policy is for {shape[0]} layers x {shape[1]} KV heads, but .* has 2 layers x 2 KV heads"
    with pytest.raises(ValueError, match=message), recycled(make_model(), policy, SELECTION):
        pass


@pytest.mark.parametrize(("n_tokens", "n_new"), [(16, 1), (30, 1), (10, 8)])
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_context_that_reaches_a_sliding_window_is_refused(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    n_tokens: int,
    n_new: int,
    how: dict[str, Any],
) -> None:
    model = make_model("mistral", sliding_window=16)
    message = r"^layer 0 attends to a sliding window of 16 tokens and the context has reached it: [^.]*\.$"
    with recycled(model, FixedStride(3), SELECTION), pytest.raises(ValueError, match=message):
        model.generate(make_tokens(n_tokens), max_new_tokens=n_new, **how)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
def test_context_within_a_sliding_window_is_welcome(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], how: dict[str, Any]
) -> None:
    model = make_model("mistral", sliding_window=16)
    stock = model.generate(make_tokens(9), max_new_tokens=6, **how)
    with recycled(model, NeverFull(), Selection(15, 2, 3)):
        assert torch.equal(model.generate(make_tokens(9), max_new_tokens=6, **how), stock)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0]])
def test_padding_anywhere_but_on_the_left_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], mask: list[int]
) -> None:
    model, tokens = make_model(), make_tokens(8, rows=2)
    message = r"^row 1 .* only\.$"
    with recycled(model, NeverFull(), SELECTION), pytest.raises(ValueError, match=message):
        model.generate(tokens, attention_mask=torch.tensor([[1] * 8, mask]), max_new_tokens=4)


def test_assisted_decoding_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    tokens = make_tokens(6).repeat(1, 3)
    with recycled(make_model(), NeverFull(), SELECTION), pytest.raises(ValueError, match=CACHE_CHANGED):
        make_model().generate(tokens, max_new_tokens=30, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "begin",
    [
        lambda model, tokens: model.generate_batch(tokens.tolist(), max_new_tokens=4),
        lambda model, tokens: model.generate(tokens, max_new_tokens=4, cache_implementation="paged"),
        lambda model, _: model.init_continuous_batching(),
    ],
    ids=["generate_batch", "paged", "manager"],
)
def test_continuous_batching_is_refused_and_the_model_is_as_it_was(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], begin: Callable[..., Any]
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="continuous batching"), recycled(model, NeverFull(), SELECTION):
        begin(model, make_tokens(12))
    assert "init_continuous_batching" not in vars(model)
    assert model.config._attn_implementation == "sdpa"


def test_mask_of_four_dimensions_shared_by_rows_is_understood(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(12, rows=3)

    def logits(own_mask: bool) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens, past_key_values=cache)
        steps = []
        for step in range(3):
            mask = (torch.arange(16) <= 12 + step)[None, None, None] if own_mask else None
            steps.append(model(tokens[:, step : step + 1], past_key_values=cache, attention_mask=mask).logits)
        return torch.cat(steps)

    found = []
    for own_mask in (False, True):
        with torch.no_grad(), recycled(model, FixedStride(2), SELECTION) as session:
            found.append((logits(own_mask), session.receipt().tokens_dense.tolist()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    assert found[0][1] == found[1][1] == [[3 * (13 + 14 + 15)] * 2] * 2


@pytest.mark.parametrize("token", [-1, 61])
def test_a_token_outside_of_the_vocabulary_is_refused_in_a_prompt_and_in_a_step(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], token: int
) -> None:
    model, tokens = make_model(), make_tokens(20)
    refusal = f"the token id {token} is outside of the model's vocabulary, 0 to 60"
    with torch.no_grad(), recycled(model, FixedStride(3), SELECTION):
        cache = prefilled(model, tokens)
        with pytest.raises(ValueError, match=refusal):
            model(torch.tensor([[token]]), past_key_values=cache)
        with pytest.raises(ValueError, match=refusal):
            model(torch.tensor([[1, token]]))


def test_a_set_far_larger_than_any_context_is_as_one_of_the_context(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    def written(selection: Selection) -> list[int]:
        with recycled(make_model(), FixedStride(3), selection):
            tokens: list[int] = make_model().generate(make_tokens(20), max_new_tokens=8)[0].tolist()
        return tokens

    huge = Selection(10**9, sinks=10**8, window=10**8, pool_forward=10**9)
    assert (
        written(huge) == written(Selection(40)) == make_model().generate(make_tokens(20), max_new_tokens=8)[0].tolist()
    )
