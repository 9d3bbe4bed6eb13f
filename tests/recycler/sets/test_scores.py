"""Attention made of products: scaling, soft-capping, and sinks that take of the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policies import Selection
from recycler.decode.plain.attention import GatheredSets, MaskedSets
from recycler.sets.recycled_set import RecycledSet
from recycler.sets.scores import Scoring, masked

ROWS, KV_HEADS, GROUP, TOKENS, HEAD_DIM, VALUE_DIM, K = 2, 2, 3, 11, 8, 5, 4
SINKS = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0]], dtype=torch.float64)
SCORINGS = [Scoring(0.3), Scoring(0.3, softcap=0.7), Scoring(0.3, None, SINKS), Scoring(0.3, 0.7, SINKS)]


def stock(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, allowed: Tensor) -> Tensor:
    """Eager attention of transformers: Gemma 2's soft-capping, and GPT-OSS's sink as one more column of the softmax."""
    logits = query @ key.transpose(-1, -2) * scoring.scaling
    if scoring.softcap is not None:
        logits = (logits / scoring.softcap).tanh() * scoring.softcap
    logits = logits.masked_fill(~allowed, float("-inf"))
    if scoring.sink_logits is None:
        return logits.softmax(-1) @ value
    sinks = scoring.sink_logits[None, :, :, None].expand(len(query), -1, -1, 1)
    return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("masking", [False, True])
def test_full_and_recycled_units_attend_as_the_models_own_function_does(scoring: Scoring, masking: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(ROWS, KV_HEADS, n, width, generator=draw, dtype=torch.float64)
        for n, width in ((GROUP, HEAD_DIM), (TOKENS, HEAD_DIM), (TOKENS, VALUE_DIM))
    )
    visible = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    visible[1, :2] = False
    positions = torch.stack([torch.randperm(9, generator=draw)[:K] + 2 for _ in range(ROWS * KV_HEADS)])
    sets = RecycledSet(
        positions.view(ROWS, KV_HEADS, K), torch.zeros(ROWS, KV_HEADS, K), Selection(k=K, sinks=0, window=0), None
    )
    full = torch.tensor([[True, False], [False, True]])
    attention = (
        MaskedSets(query, (key[:, :, :6], key[:, :, 6:]), (value[:, :, :6], value[:, :, 6:]), visible, scoring)
        if masking
        else GatheredSets(query, key, value, visible, scoring)
    )
    held = torch.zeros(ROWS, KV_HEADS, TOKENS, dtype=torch.bool).scatter(-1, sets.positions, True)
    allowed = torch.where(full[..., None], visible[:, None], held)[:, :, None]
    found = attention.attend(full, sets)
    torch.testing.assert_close(found.output, stock(query, key, value, scoring, allowed))
    for weights in (found.full_probabilities, found.set_probabilities, attention.score(full.nonzero(as_tuple=True))):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))


def test_arguments_of_an_attention_function_say_how_it_scores() -> None:
    key = torch.zeros(1, KV_HEADS, 3, HEAD_DIM)
    assert Scoring.of_call(key, {"scaling": 0.5, "dropout": 0.0, "s_aux": None}) == Scoring(0.5)
    found = Scoring.of_call(key, {"scaling": 0.5, "softcap": 50.0, "s_aux": SINKS.flatten()})
    assert (found.scaling, found.softcap) == (0.5, 50.0)
    assert found.sink_logits is not None
    assert torch.equal(found.sink_logits, SINKS)


def test_masked_logits_are_at_least_of_float32() -> None:
    found = masked(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([True, False]))
    assert found.dtype == torch.float32
    assert found.tolist() == [0.0, float("-inf")]
