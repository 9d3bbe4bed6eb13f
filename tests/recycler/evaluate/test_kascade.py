"""Kascade: anchors look, the layers between follow them, and what is read is counted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.evaluate.kascade import Kascade
from recycler.evaluate.kascade_anchors import best_anchors, kascade_for
from recycler.model.loading import LoadedModel
from recycler.tasks import TaskPrompt

ITSELF = (0, 1)


def kascade_of(k: int, anchors: tuple[int, ...], heads: tuple[tuple[int, ...], ...]) -> Kascade:
    return Kascade("kascade", "", k, anchors, heads)


@settings(deadline=None)
@given(n_layers=st.integers(1, 7), n_anchors=st.integers(1, 7), seed=st.integers(0, 99))
def test_no_other_anchors_serve_all_layers_better(n_layers: int, n_anchors: int, seed: int) -> None:
    worth = np.random.default_rng(seed).random((n_layers, n_layers))
    n_anchors = min(n_anchors, n_layers)

    def total(anchors: tuple[int, ...]) -> float:
        return sum(worth[max(one for one in anchors if one <= layer), layer] for layer in range(n_layers))

    tried = [(0, *rest) for rest in itertools.combinations(range(1, n_layers), n_anchors - 1)]
    found = best_anchors(worth, n_anchors)
    assert found in tried
    assert total(found) == pytest.approx(max(total(one) for one in tried))


def test_more_anchors_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="a model of 3 layers has 1 to 3 anchors, not 4"):
        best_anchors(np.ones((3, 3)), 4)


@pytest.mark.parametrize("anchors", [(0,), (0, 1)])
def test_as_many_tokens_as_there_are_is_the_stock_decoder(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], anchors: tuple[int, ...]
) -> None:
    model, tokens = make_model(), make_tokens(48)[0]
    rows = kascade_of(48, anchors, (ITSELF, (1, 0))).begin(model, read_prompt(model, tokens[:18], 30))
    with torch.no_grad():
        stock = model(tokens[None]).logits[0]
    for place in range(18, 48):
        step = rows.step(tokens[place : place + 1])
        torch.testing.assert_close(step.logits[0], stock[place], rtol=0, atol=1e-10)
        assert step.full.all()
        assert (step.tokens_read == place + 1).all()


def test_a_layer_attends_to_what_the_heads_it_follows_found_in_the_anchor(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One anchor, which attends to everything: its attention is stock, and so are keys and queries of the second layer.
    model, tokens, k, n = copy.deepcopy(make_model(layers=2)), make_tokens(20)[0], 5, 18
    step = kascade_of(k, (0,), (ITSELF, (1, 0))).begin(model, read_prompt(model, tokens[:n], 2)).step(tokens[n : n + 1])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens[None, : n + 1], output_attentions=True).attentions[0][0, :, -1]
        # Eager attention has its softmax in float32.
        model.set_attn_implementation("sdpa")
        found = weights.unflatten(0, (2, -1)).sum(1).topk(k).indices
        mask = torch.zeros(4, n + 1, dtype=torch.bool)
        for head, followed in enumerate((1, 1, 0, 0)):
            mask[head, found[followed]] = True
        whole = torch.ones(n + 1, n + 1, dtype=torch.bool).tril().expand(1, 4, -1, -1)
        masked = whole.clone()
        masked[0, :, -1] = mask
        second = model.model.layers[1].self_attn
        stock = second.forward

        def forward(*args: object, **kwargs: object) -> object:
            bias = torch.zeros(masked.shape, dtype=torch.float64).masked_fill(~masked, float("-inf"))
            return stock(*args, **{**kwargs, "attention_mask": bias})

        second.forward = forward
        expected = model(tokens[None, : n + 1], attention_mask=None).logits[0, -1]
    torch.testing.assert_close(step.logits[0], expected, rtol=0, atol=1e-10)
    assert step.full[0].tolist() == [[1, 1], [0, 0]]
    assert step.tokens_read[0].tolist() == [[n + 1, n + 1], [k, k]]


def test_an_anchor_reads_all_keys_and_the_values_of_what_it_found(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(layers=2), make_tokens(20)[0]
    rows = kascade_of(6, (0, 1), (ITSELF, ITSELF)).begin(model, read_prompt(model, tokens[:19], 1))
    step = rows.step(tokens[19:20])
    assert step.tokens_read[0].tolist() == [[20, 20], [13, 13]]
    assert step.full[0].tolist() == [[1, 1], [0.5, 0.5]]


def test_rows_of_several_prompts_are_each_themselves_alone(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(layers=2), make_tokens(24, rows=3)
    kascade = kascade_of(5, (0,), (ITSELF, (1, 0)))
    read = [read_prompt(model, row[:20], 4) for row in tokens]
    together = kascade.begin(model, ReadPrompt.side_by_side(read))
    alone = [kascade.begin(model, one) for one in read]
    for place in range(20, 24):
        step = together.step(tokens[:, place])
        for row, one in enumerate(alone):
            expected = one.step(tokens[row, place : place + 1])
            torch.testing.assert_close(step.logits[row], expected.logits[0], rtol=0, atol=1e-10)
            np.testing.assert_array_equal(step.tokens_read[row], expected.tokens_read[0])


def test_a_model_all_of_whose_layers_are_anchors_follows_nobody(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    found = kascade_for(loaded, [make_task(seed).prompt for seed in (1, 2)], "kascade", 4, n_anchors=2)
    assert found.anchors == (0, 1)
    assert found.heads == (ITSELF, ITSELF)


def test_a_layer_follows_the_head_of_the_anchor_whose_tokens_have_most_of_its_attention(
    load: Callable[..., LoadedModel], make_task: Callable[..., TaskPrompt]
) -> None:
    loaded, prompt, k = load(), make_task(3).prompt, 4
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    text = torch.tensor(prompt.tokens)[None]
    with torch.no_grad():
        attention = model(text, output_attentions=True).attentions
    # `(layers, kv_heads, steps, tokens)`, those of the text's own steps.
    weights = torch.stack([of[0].unflatten(0, (2, -1)).sum(1) for of in attention])[:, :, prompt.n_prompt_tokens :]
    expected = []
    for head in range(2):
        own = weights[1, head].topk(k).values.sum(-1)
        kept = [weights[1, head].gather(-1, weights[0, of].topk(k).indices).sum(-1) / own for of in range(2)]
        expected.append(int(torch.stack(kept).amin(-1).argmax()))
    found = kascade_for(loaded, [prompt], "kascade", k, n_anchors=1)
    assert found.anchors == (0,)
    assert found.heads == (ITSELF, tuple(expected))


def test_anchors_are_those_whose_tokens_serve_best_the_layers_that_turn_the_residual_stream_most(
    make_model: Callable[..., PreTrainedModel], make_task: Callable[..., TaskPrompt]
) -> None:
    k, layers, model = 4, 5, make_model(layers=5)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    after: list[Tensor] = []
    for layer in eager.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, given: after.append(given[0]))
    prompts = [make_task(seed).prompt for seed in (3, 4, 5)]
    kept, turned = np.zeros((3, layers, layers, 2, 2)), np.zeros((3, layers))
    for place, prompt in enumerate(prompts):
        after.clear()
        with torch.no_grad():
            found = eager(torch.tensor(prompt.tokens)[None], output_attentions=True, output_hidden_states=True)
        weights = [of[0].unflatten(0, (2, -1)).sum(1)[:, prompt.n_prompt_tokens :] for of in found.attentions]
        for layer in range(layers):
            cosine = torch.cosine_similarity(found.hidden_states[layer], after[layer], dim=-1)[0]
            # Of what was read with the continuation: the prompt's last token and all of that.
            turned[place, layer] = 1 - cosine[prompt.n_prompt_tokens - 1 :].mean()
            for anchor, head, followed in itertools.product(range(layers), range(2), range(2)):
                own = weights[layer][head].topk(k).values.sum(-1)
                held = weights[layer][head].gather(-1, weights[anchor][followed].topk(k).indices).sum(-1)
                kept[place, anchor, layer, head, followed] = (held / own).min()
    worth = kept.mean(0).max(-1).mean(-1) * turned.mean(0)
    without = kept.mean(0).max(-1).mean(-1)
    loaded = LoadedModel(model, None, "tiny")  # type: ignore[arg-type]
    numbers = range(2, layers)
    for n in numbers:
        kascade = kascade_for(loaded, prompts, "kascade", k, n_anchors=n)
        assert kascade.anchors == best_anchors(worth, n)
        for layer in set(range(layers)) - set(kascade.anchors):
            anchor = max(one for one in kascade.anchors if one < layer)
            assert kascade.heads[layer] == tuple(kept.mean(0)[anchor, layer].argmax(-1))
    # What layers turn counts: without, others would be chosen.
    assert any(best_anchors(without, n) != best_anchors(worth, n) for n in numbers)


def test_a_model_that_norms_what_attention_adds_is_refused(
    make_model: Callable[..., PreTrainedModel], make_task: Callable[..., TaskPrompt]
) -> None:
    gemma = LoadedModel(make_model("gemma2", attention="eager", head_dim=8), None, "tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not for Gemma2ForCausalLM"):
        kascade_for(gemma, [make_task(3).prompt], "kascade", 4, n_anchors=1)


@pytest.mark.parametrize(
    ("k", "anchors", "said"),
    [
        (0, (0,), "at least one token, not k = 0"),
        (4, (), r"rise from 0, not \[\]"),
        (4, (1,), r"rise from 0, not \[1\]"),
        (4, (0, 1, 1), r"rise from 0, not \[0, 1, 1\]"),
        (4, (0, 2), "no layer 2 of 2 to be an anchor"),
    ],
)
def test_what_cannot_be_anchors_is_refused(k: int, anchors: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kascade_of(k, anchors, (ITSELF, ITSELF))


def test_heads_of_another_model_are_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(layers=2), make_tokens(9)[0]
    with pytest.raises(ValueError, match="kascade is for 3 layers of 2 KV heads, and the model has 2 of 2"):
        kascade_of(4, (0,), (ITSELF, ITSELF, ITSELF)).begin(model, read_prompt(model, tokens[:8], 1))
