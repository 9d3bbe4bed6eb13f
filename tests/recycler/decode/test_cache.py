"""A cache that grows in place is, to transformers, the cache that it replaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from recycler.decode.cache import GrowingTokens, KvLayer, growing_layers

N_PROMPT, N_OWN = 7, 3


def tokens_of(n: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, n, 4, generator=torch.Generator().manual_seed(seed))


def append(tokens: GrowingTokens, more: Tensor) -> None:
    """As an engine does, token by token."""
    for i in range(more.shape[2]):
        tokens.make_room()
        tokens.own[:, :, tokens.n_own] = more[:, :, i]
        tokens.n_own += 1


def grown_layer() -> KvLayer:
    key, value = (GrowingTokens.after(tokens_of(N_PROMPT, seed=seed)) for seed in (1, 2))
    append(key, tokens_of(N_OWN, seed=3))
    append(value, tokens_of(N_OWN, seed=4))
    return KvLayer(key, value)


def stock_layer() -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(tokens_of(N_PROMPT, seed=1), tokens_of(N_PROMPT, seed=2))
    layer.update(tokens_of(N_OWN, seed=3), tokens_of(N_OWN, seed=4))
    return layer


def assert_same_layer(layer: DynamicLayer, stock: DynamicLayer) -> None:
    assert torch.equal(layer.keys, stock.keys)
    assert torch.equal(layer.values, stock.values)
    assert layer.get_seq_length() == stock.get_seq_length()
    assert layer.get_mask_sizes(1) == stock.get_mask_sizes(1)
    assert layer.get_mask_sizes(5) == stock.get_mask_sizes(5)


class TestLayer:
    def test_it_is_the_dynamic_layer_of_the_same_tokens(self) -> None:
        layer = grown_layer()
        assert isinstance(layer, DynamicLayer)
        assert layer.is_initialized
        assert (layer.dtype, layer.device) == (torch.float32, torch.device("cpu"))
        assert_same_layer(layer, stock_layer())

    def test_updates_append_and_return_all_tokens(self) -> None:
        layer, stock = grown_layer(), stock_layer()
        more = tokens_of(2, seed=5), tokens_of(2, seed=6)
        for mine, theirs in zip(layer.update(*more), stock.update(*more), strict=True):
            assert torch.equal(mine, theirs)
        assert_same_layer(layer, stock)

    @pytest.mark.parametrize("n_removed", [1, N_OWN, N_OWN + 2, 9])
    def test_crops_as_a_dynamic_layer(self, n_removed: int) -> None:
        layer, stock = grown_layer(), stock_layer()
        layer.crop(-n_removed)
        stock.crop(-n_removed)
        assert layer.get_seq_length() == N_PROMPT + N_OWN - n_removed
        assert_same_layer(layer, stock)

    def test_rows_are_reordered_selected_and_repeated_as_in_a_dynamic_layer(self) -> None:
        layer, stock = grown_layer(), stock_layer()
        for one in (layer, stock):
            one.reorder_cache(torch.tensor([1, 0]))
        assert_same_layer(layer, stock)
        for one in (layer, stock):
            one.batch_repeat_interleave(2)
        assert_same_layer(layer, stock)
        for one in (layer, stock):
            one.batch_select_indices(torch.tensor([3, 0, 0]))
        assert_same_layer(layer, stock)
        assert layer.keys.shape[0] == 3

    def test_whoever_sets_tokens_is_noticed_and_whoever_reads_them_is_not(self) -> None:
        layer = grown_layer()
        assert layer.keys.shape == layer.values.shape
        assert layer.revision == 0
        layer.keys = tokens_of(4)
        assert layer.revision == 1
        layer.values = tokens_of(4)
        assert layer.revision == 2
        assert layer.get_seq_length() == 4
        assert torch.equal(layer.keys, tokens_of(4))

    def test_an_emptied_layer_has_no_tokens(self) -> None:
        layer = grown_layer()
        layer.keys = layer.values = None
        assert layer.keys is None
        assert layer.values is None
        assert layer.get_seq_length() == 0

    def test_after_a_reset_it_fills_again_as_a_dynamic_layer(self) -> None:
        layer, new = grown_layer(), DynamicLayer()
        layer.reset()
        for one in (layer, new):
            assert one.get_seq_length() == 0
            one.update(tokens_of(2, seed=5), tokens_of(2, seed=6))
        assert_same_layer(layer, new)


class TestGrowth:
    def test_the_prompt_is_never_copied(self) -> None:
        prompt = tokens_of(N_PROMPT)
        tokens = GrowingTokens.after(prompt)
        assert tokens.joined().data_ptr() == prompt.data_ptr()
        append(tokens, tokens_of(600, seed=1))
        assert tokens.prompt.data_ptr() == prompt.data_ptr()

    def test_tokens_stay_when_the_room_grows(self) -> None:
        prompt, more = tokens_of(N_PROMPT), tokens_of(600, seed=1)
        tokens, grown = GrowingTokens.after(prompt), []
        room = tokens.own.shape[2]
        for i in range(600):
            if tokens.make_room():
                grown.append(i)
            tokens.own[:, :, tokens.n_own] = more[:, :, i]
            tokens.n_own += 1
        assert grown == [64 * n for n in range(1, 10)]
        assert room == 64
        assert tokens.n_tokens == N_PROMPT + 600
        assert torch.equal(tokens.joined(), torch.cat([prompt, more], dim=2))

    @pytest.mark.parametrize("n_prompt", [1, 4096, 20_000])
    def test_little_room_is_empty_and_tokens_are_rarely_copied(self, n_prompt: int) -> None:
        tokens = GrowingTokens.after(torch.zeros(1, 1, n_prompt, 1))
        n_copied = 0
        for _ in range(30_000):
            n_copied += tokens.n_own * tokens.make_room()
            tokens.n_own += 1
            assert tokens.own.shape[2] - tokens.n_own < max(64, tokens.n_tokens / 40)
        assert n_copied <= 40 * 30_000

    def test_rows_may_share_a_prompt(self) -> None:
        prompt, more = tokens_of(N_PROMPT, rows=1), tokens_of(N_OWN, rows=5)
        tokens = GrowingTokens.after(prompt, rows=5)
        append(tokens, more)
        assert tokens.prompt.shape[0] == 1
        assert torch.equal(tokens.joined(), torch.cat([prompt.expand(5, -1, -1, -1), more], dim=2))

    def test_a_prompt_that_is_not_contiguous_is_made_so(self) -> None:
        prompt = tokens_of(N_PROMPT).transpose(1, 2).contiguous().transpose(1, 2)
        assert not prompt.is_contiguous()
        tokens = GrowingTokens.after(prompt)
        assert tokens.prompt.is_contiguous()
        assert torch.equal(tokens.prompt, prompt)


class TestCache:
    CONFIG = LlamaConfig(num_hidden_layers=2)

    def filled(self) -> DynamicCache:
        cache = DynamicCache(config=self.CONFIG)
        for layer in range(2):
            cache.update(tokens_of(N_PROMPT, seed=layer), tokens_of(N_PROMPT, seed=layer + 9), layer)
        return cache

    def test_layers_are_replaced_by_growing_ones_without_a_copy(self) -> None:
        cache = self.filled()
        addresses = [layer.keys.data_ptr() for layer in cache.layers]
        layers = growing_layers(cache)
        assert all(mine is own for mine, own in zip(layers, cache.layers, strict=True))
        assert [layer.keys.data_ptr() for layer in layers] == addresses
        assert cache.get_seq_length() == N_PROMPT

    def test_growing_layers_are_kept(self) -> None:
        cache = self.filled()
        first = growing_layers(cache)
        append(first[0].key, tokens_of(1))
        assert [id(layer) for layer in growing_layers(cache)] == [id(layer) for layer in first]
        assert first[0].get_seq_length() == N_PROMPT + 1

    def test_other_layers_are_refused_and_then_none_is_replaced(self) -> None:
        cache = self.filled()
        cache.layers[1] = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=4)).layers[0]
        before = list(cache.layers)
        with pytest.raises(TypeError, match=r"^DynamicSlidingWindowLayer$"):
            growing_layers(cache)
        assert [id(layer) for layer in cache.layers] == [id(layer) for layer in before]

    def test_a_copy_of_a_cache_goes_its_own_way(self) -> None:
        cache = self.filled()
        for layer in growing_layers(cache):
            append(layer.key, tokens_of(N_OWN, seed=3))
            append(layer.value, tokens_of(N_OWN, seed=4))
        before = [layer.keys for layer in cache.layers]
        copied = copy.deepcopy(cache)
        for layer, keys in zip(copied.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            layer.key.prompt.zero_()
            append(layer.key, tokens_of(N_OWN, seed=5))
            append(layer.value, tokens_of(N_OWN, seed=6))
        assert copied.get_seq_length() == N_PROMPT + 2 * N_OWN
        assert cache.get_seq_length() == N_PROMPT + N_OWN
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
