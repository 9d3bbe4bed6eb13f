"""Rows whose sets are of a layer, which engines leave to the plain path; what else rows do is the engines' contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    FixedStride,
    LayerCosine,
    NeverFull,
    RefreshKeys,
    Selection,
    SentenceBoundary,
)
from recycler.decode.plain.attention import MaskedSets, UnitAttention
from recycler.decode.plain.decoding import PlainDecoding
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.recycled import recycled
from recycler.decode.rows import Rows, RowsStep, decode_rows
from recycler.sets.recycled_set import RecycledSet

N_PROMPT, N_STEPS = 18, 20
ENDS = tuple(range(0, 61, 5))
# Those by which the heads of a layer decide alike.
BY_LAYER = (
    AlwaysFull(),
    NeverFull(),
    FixedStride(4),
    LayerCosine(0.8, check_every=3),
    SentenceBoundary(ENDS, 6),
    RefreshKeys(LayerCosine(0.9, check_every=2)),
)
TOVA = Selection(6, 0, 0, 0, 0, "layer_mean", "updated")  # type: ignore[arg-type]


def read(model: PreTrainedModel, tokens: Tensor, selection: Selection) -> ReadPrompt:
    return read_prompt(model, tokens, N_STEPS, prompt_queries=[selection.prompt_queries])


def follow(rows: Rows, n_rows: int, text: Tensor) -> list[RowsStep]:
    return [rows.step(token.expand(n_rows)) for token in text]


def write(rows: Rows, prompt: ReadPrompt, n_rows: int) -> list[list[int]]:
    """What each row writes greedily."""
    tokens = prompt.logits.argmax(-1).expand(n_rows)
    written = [tokens]
    for _ in range(N_STEPS):
        tokens = rows.step(tokens).logits.argmax(-1)
        written.append(tokens)
    return torch.stack(written, dim=1).tolist()


def test_a_mean_over_the_layer_is_left_to_the_plain_path(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    prompt = read(model, tokens[:N_PROMPT], TOVA)
    asked, kept = (decode_rows(model, prompt, BY_LAYER, TOVA, fast=fast) for fast in (True, False))
    assert isinstance(asked.decoding, PlainDecoding)
    pairs = zip(*(follow(rows, len(BY_LAYER), tokens[N_PROMPT:]) for rows in (asked, kept)), strict=True)
    for one, other in pairs:
        assert torch.equal(one.logits, other.logits)
        assert (one.full == one.full[..., :1]).all()


@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated"])
def test_with_a_mean_over_the_layer_all_its_heads_hold_the_same_tokens_in_the_same_slots(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    ranking: str,
) -> None:
    selection = Selection(6, 1, 1, group="layer_mean", ranking=ranking)  # type: ignore[arg-type]
    positions: list[Tensor] = []
    stock = MaskedSets.attend

    def noting(attention: MaskedSets, full: Tensor, sets: RecycledSet, **how: bool) -> UnitAttention:
        positions.append(sets.positions.clone())
        return stock(attention, full, sets)

    monkeypatch.setattr(MaskedSets, "attend", noting)
    model, tokens = make_model(kv_heads=4), make_tokens(N_PROMPT + N_STEPS)[0]
    prompt = read(model, tokens[:N_PROMPT], selection)
    follow(decode_rows(model, prompt, BY_LAYER, selection), len(BY_LAYER), tokens[N_PROMPT:])
    assert len(positions) == 2 * N_STEPS
    assert all(torch.equal(held, held[:, :1].expand_as(held)) for held in positions)
    assert len({str(held.sort(-1).values.tolist()) for held in positions}) == len(positions)


def test_heads_that_decide_apart_cannot_pool_over_their_layer(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    rows = decode_rows(model, read(model, tokens[:N_PROMPT], TOVA), [FixedStride(((2, 3), (4, 4)))], TOVA)
    with pytest.raises(ValueError, match="'layer_mean' needs all KV heads of a layer to run full together"):
        follow(rows, 1, tokens[N_PROMPT:])


def test_heads_that_refresh_in_different_ways_cannot_pool_over_their_layer(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    prompt = read(model, tokens[:N_PROMPT], TOVA)
    rows = decode_rows(model, prompt, [RefreshKeys(FixedStride(3), ((1, 1), (1, 0)))], TOVA)
    with pytest.raises(ValueError, match="all by full steps or all by their keys alone, and this policy"):
        follow(rows, 1, tokens[N_PROMPT:])


def test_each_row_writes_what_it_writes_alone(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT)
    prompt = read(model, tokens[0], TOVA)
    together = write(decode_rows(model, prompt, BY_LAYER, TOVA), prompt, len(BY_LAYER))
    assert len({str(row) for row in together}) > len(BY_LAYER) // 2
    for row, policy in enumerate(BY_LAYER):
        with recycled(model, policy, TOVA):
            written = model.generate(tokens, max_new_tokens=N_STEPS + 1, do_sample=False)
        assert together[row] == written[0, N_PROMPT:].tolist(), policy.kind
