"""A trace says, for every age, what a decoder that takes one step after the other would have measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from policies import AlwaysFull, FixedStride, Selection, StepPolicy
from recycler.decode.recycled import recycled
from recycler.prompts import Prompt
from recycler.record.one_prompt import record_trace
from traces import Trace

BY_AGE = ("recovered_mass", "query_similarity", "overlap")


def prompt_of(tokens: Tensor, n_steps: int) -> Prompt:
    return Prompt("random", "noise", tokens[0].numpy(), tokens.shape[1] - n_steps, "drawn", "CC0-1.0")


def queries_and_keys(model: PreTrainedModel, tokens: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer `(query_heads, tokens, head_dim)` and `(kv_heads, tokens, head_dim)`, of the stock model."""
    found = []

    def note(module: Any, _: Any, inputs: dict[str, Any]) -> None:
        query, key = (
            projection(inputs["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *inputs["position_embeddings"])
        found.append((query[0].numpy(), key[0].numpy()))

    handles = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def record_plainly(
    model: PreTrainedModel,
    prompt: Prompt,
    selection: Selection,
    max_age: int,
    plain_set: Callable[..., Any],
    selection_of_unit: Callable[..., Selection] = lambda selection, layer, head: selection,
) -> dict[str, np.ndarray]:
    """Ages every set of every unit token by token."""
    tokens = torch.as_tensor(prompt.tokens.astype(np.int64))[None]
    layers = queries_and_keys(model, tokens)
    kv_heads = layers[0][1].shape[0]
    n_steps, first = prompt.n_steps, prompt.n_prompt_tokens - 1
    arrays = {name: np.full((n_steps, max_age, len(layers), kv_heads), np.nan) for name in BY_AGE}
    arrays["fresh_mass"] = np.full((n_steps + 1, len(layers), kv_heads), np.nan)
    for layer, head in np.ndindex(len(layers), kv_heads):
        query, key = layers[layer]
        grouped = query.reshape(kv_heads, -1, *query.shape[1:])[head]
        every = [
            grouped[:, place] @ key[head, : place + 1].T / np.sqrt(query.shape[-1])
            for place in range(len(prompt.tokens))
        ]
        logits = every[first:]
        weights = [softmax(row) for row in logits]
        # The set that prefill chooses is the choice of the prompt's last queries, of which there may be fewer.
        voters = [softmax(row) for row in every[: first + 1][-(selection.prompt_queries or 0) :]]
        votes = np.sum([np.pad(row, ((0, 0), (0, first + 1 - row.shape[1]))) for row in voters], axis=0)
        mean_query = grouped.mean(0)[first:]
        mean_query /= np.linalg.norm(mean_query, axis=-1, keepdims=True)
        of_unit = selection_of_unit(selection, layer, head)
        fresh = [set(plain_set(row, of_unit).places) for row in weights]
        for source in range(n_steps + 1):
            aged = plain_set(weights[source] if source else votes, of_unit)
            arrays["fresh_mass"][source, layer, head] = weights[source].mean(0)[aged.places].sum()
            for row in range(source + 1, min(source + max_age, n_steps) + 1):
                aged.admit(first + row)
                measured = {
                    "recovered_mass": weights[row].mean(0)[aged.places].sum(),
                    "query_similarity": mean_query[source] @ mean_query[row],
                    "overlap": len(fresh[row] & set(aged.places)) / len(fresh[row]),
                }
                for name, value in measured.items():
                    arrays[name][row - 1, row - source - 1, layer, head] = value
                aged.rescore(softmax(logits[row][:, aged.places]))
    return arrays


def assert_agree(trace: Trace, expected: dict[str, np.ndarray]) -> None:
    step, ages = np.arange(trace.header.n_steps)[:, None], np.array(trace.header.ages)
    # Of the first age that no set has yet, the entry is that of the prompt's set.
    column, there_is_none = np.minimum(ages, step + 1) - 1, np.concatenate([[0], ages[:-1]]) >= step + 1
    for name, values in expected.items():
        if name in BY_AGE:
            values = np.where(there_is_none[..., None, None], np.nan, values[step, column])
        np.testing.assert_allclose(getattr(trace, name), values, rtol=0, atol=2e-7, err_msg=name)


SITUATIONS = {
    "plain": (20, 14, 6, Selection(8, sinks=2, window=3, pool_forward=2)),
    "window above max_age": (20, 14, 4, Selection(12, sinks=1, window=7, pool_backward=1)),
    "window below max_age": (20, 14, 12, Selection(8, sinks=2, window=1, pool_backward=2, pool_forward=3)),
    "no window, no sinks": (20, 14, 14, Selection(5, sinks=0, window=0, pool_forward=0)),
    "new tokens push all others out": (20, 14, 14, Selection(3, sinks=1, window=0)),
    "no room but sinks and window": (20, 14, 14, Selection(5, sinks=3, window=2)),
    "one token": (20, 14, 14, Selection(1, sinks=0, window=0)),
    "prompt of one token": (1, 14, 14, Selection(5, sinks=1, window=2)),
    "prompt within the sinks": (3, 14, 9, Selection(8, sinks=5, window=2)),
    "prompt below k": (6, 14, 9, Selection(10, sinks=1, window=2)),
    "all fits": (6, 8, 8, Selection(40, sinks=4, window=32)),
    "pooling beyond the text": (4, 8, 8, Selection(4, sinks=1, window=1, pool_backward=30, pool_forward=30)),
    "one step": (9, 1, 3, Selection(4, sinks=1, window=1)),
    "several queries choose the first set": (20, 14, 9, Selection(8, sinks=1, window=2, prompt_queries=5)),
    "more queries than prompt": (6, 8, 8, Selection(4, sinks=1, window=1, prompt_queries=32)),
    "age one only": (9, 8, 1, Selection(4, sinks=1, window=1)),
    "more ages than steps": (9, 5, 20, Selection(4, sinks=1, window=1)),
    "more steps than a block": (5, 140, 3, Selection(6, sinks=1, window=2)),
    "blocks as wide as the ages": (5, 170, 80, Selection(6, sinks=1, window=2, pool_forward=1)),
}


@pytest.mark.parametrize("ranking", ["last_full", "updated", "decayed"])
@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_age_is_what_a_step_by_step_decoder_measures(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    plain_set: Callable[..., Any],
    situation: str,
    group: str,
    ranking: str,
) -> None:
    n_prompt, n_steps, max_age, selection = SITUATIONS[situation]
    selection = Selection(**(vars(selection) | {"group": group, "ranking": ranking}))
    prompt = prompt_of(make_tokens(n_prompt + n_steps), n_steps)
    trace = record_trace(make_model(), prompt, selection, max_age=max_age)
    assert_agree(trace, record_plainly(make_model(), prompt, selection, max_age, plain_set))


SIZED = {
    "plain": (20, 14, 9, Selection(8, 2, 3, pool_forward=2, unit_k=((5, 12), (6, 9)))),
    "no window, no sinks": (20, 14, 14, Selection(5, 0, 0, pool_forward=0, unit_k=((1, 7), (10, 2)))),
    "no room but sinks and window": (20, 14, 14, Selection(6, 3, 2, unit_k=((5, 5), (5, 9)))),
    "some units hold the whole text": (20, 14, 14, Selection(30, 1, 2, unit_k=((3, 40), (34, 40)))),
    "prompt below some sizes": (6, 14, 14, Selection(8, 1, 2, unit_k=((3, 12), (7, 10)))),
    "prompt within the sinks": (3, 14, 9, Selection(10, 5, 2, unit_k=((7, 13), (8, 12)))),
    "several queries choose the first set": (20, 14, 9, Selection(8, 1, 2, prompt_queries=5, unit_k=((3, 13), (8, 8)))),
    "more steps than a block": (5, 140, 3, Selection(6, 1, 2, unit_k=((4, 9), (3, 7)))),
}


@pytest.mark.parametrize("ranking", ["last_full", "updated", "decayed"])
@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("situation", SIZED)
def test_every_unit_is_recorded_with_a_set_of_its_own_size(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    plain_set: Callable[..., Any],
    selection_of_unit: Callable[..., Selection],
    situation: str,
    group: str,
    ranking: str,
) -> None:
    n_prompt, n_steps, max_age, selection = SIZED[situation]
    selection = Selection(**(vars(selection) | {"group": group, "ranking": ranking}))
    prompt = prompt_of(make_tokens(n_prompt + n_steps), n_steps)
    trace = record_trace(make_model(), prompt, selection, max_age=max_age)
    assert_agree(trace, record_plainly(make_model(), prompt, selection, max_age, plain_set, selection_of_unit))


@pytest.mark.parametrize("ranking", ["last_full", "updated", "decayed"])
def test_a_table_of_one_size_is_recorded_as_k_is(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], ranking: str
) -> None:
    prompt = prompt_of(make_tokens(34), 14)
    one, other = (
        record_trace(make_model(), prompt, Selection(8, 2, 3, ranking=ranking, unit_k=unit_k), max_age=14)
        for unit_k in (None, ((8, 8), (8, 8)))
    )
    for name in (*BY_AGE, "fresh_mass"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_unit_is_recorded_as_if_all_had_its_size(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    prompt, unit_k = prompt_of(make_tokens(34), 14), ((5, 12), (6, 9))
    trace = record_trace(make_model(), prompt, Selection(8, 2, 3, unit_k=unit_k), max_age=14)
    for unit in np.ndindex(2, 2):
        alone = record_trace(make_model(), prompt, Selection(unit_k[unit[0]][unit[1]], 2, 3), max_age=14)
        for name in (*BY_AGE, "fresh_mass"):
            found, expected = (getattr(one, name)[(..., *unit)] for one in (trace, alone))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7, err_msg=name)


def test_heads_that_are_recorded_apart_keep_their_own_sizes(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One KV head in float64 takes 1.6 MiB.
    model, prompt = make_model(kv_heads=4, layers=1), prompt_of(make_tokens(200), 90)
    selection = Selection(9, 1, 2, unit_k=((3, 15, 6, 12),))
    whole = record_trace(model, prompt, selection, max_age=20)
    parts = record_trace(model, prompt, selection, max_age=20, memory_mib=2)
    for name in (*BY_AGE, "fresh_mass"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(
    "model",
    [
        {"family": "qwen2"},
        {"family": "mistral", "query_heads": 6, "kv_heads": 2, "head_dim": 8},
        {"query_heads": 4, "kv_heads": 4, "layers": 3},
        {"query_heads": 4, "kv_heads": 1, "layers": 1},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_every_model_is_recorded(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    plain_set: Callable[..., Any],
    model: dict[str, Any],
) -> None:
    selection = Selection(7, sinks=1, window=2, pool_forward=1, ranking="updated")
    prompt = prompt_of(make_tokens(30), 12)
    trace = record_trace(make_model(**model), prompt, selection, max_age=8)
    assert_agree(trace, record_plainly(make_model(**model), prompt, selection, 8, plain_set))


@pytest.mark.parametrize("ranking", ["last_full", "updated", "decayed"])
@pytest.mark.parametrize(
    ("policy", "layers"), [(AlwaysFull(), 2), (FixedStride(((3, 5),), ((1, 0),)), 1), (FixedStride(((4, 2.5),)), 1)]
)
def test_trace_holds_the_signals_that_a_live_session_shows(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    spy: Callable[..., Any],
    policy: StepPolicy,
    layers: int,
    ranking: str,
) -> None:
    # Always full is the path that traces record; so is, in a model of one layer, every path.
    model, tokens = make_model(layers=layers), make_tokens(34)
    selection = Selection(7, sinks=1, window=2, ranking=ranking)
    trace = record_trace(model, prompt_of(tokens, 14), selection, max_age=14)
    spying = spy(policy)
    with torch.no_grad(), recycled(model, spying, selection, fast=False):
        cache = model(tokens[:, :20]).past_key_values
        for step in range(14):
            model(tokens[:, 20 + step : 21 + step], past_key_values=cache)
    for layer, steps in spying.seen.items():
        for step, (shown, after) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
            for head in range(2):
                age = int(shown["age"][0, head])
                unit = (layer, head)
                expected = {
                    "query_similarity": trace.query_similarity[step, age - 1][unit],
                    "step_similarity": trace.query_similarity[step, 0][unit],
                    "refresh_mass": trace.fresh_mass[step - age + 1][unit],
                }
                for name, value in expected.items():
                    assert shown[name][0, head] == pytest.approx(value, abs=2e-7)
                if shown["full"][0, head] and after is not None:
                    overlap = trace.overlap[step, age - 1][unit]
                    assert after["refresh_overlap"][0, head] == pytest.approx(overlap, abs=2e-7)
