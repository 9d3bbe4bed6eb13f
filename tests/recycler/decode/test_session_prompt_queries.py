"""The session's first set where several queries of the prompt choose it: that of `read_prompt`, however it prefills."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import FixedStride, NeverFull, Selection
from recycler.decode import last_prompt as module
from recycler.decode.first_sets import LayerFirstSets, first_sets_of_layer
from recycler.decode.read_prompt import read_prompt
from recycler.decode.recycled import recycled
from recycler.decode.rows import decode_rows

N_PROMPT, N_NEW = 20, 12
# Row by row: to the left of its prompt.
PADDING = (0, 7, 13)
H2O = Selection(6, 0, 3, 0, 0, "mean", "accumulated", None)  # type: ignore[arg-type]
SELECTIONS = {
    "3": Selection(7, sinks=1, window=2, pool_backward=1, pool_forward=2, prompt_queries=3),
    # More queries than the shortest row has tokens.
    "9": Selection(6, sinks=0, window=1, group="mean", prompt_queries=9),  # type: ignore[arg-type]
    "all": Selection(7, sinks=1, window=2, prompt_queries=None),
    "h2o": H2O,
}


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


@pytest.fixture
def first_sets(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[list[int]]]]:
    """Places `[layer][row][kv_head]` that the session chose last at the end of a prompt or of a chunk."""
    chosen: dict[int, list[list[list[int]]]] = {}

    def noting(layer: int, *arguments: Any) -> LayerFirstSets:
        found = first_sets_of_layer(layer, *arguments)
        chosen[layer] = places(found.sets.positions)
        return found

    monkeypatch.setattr(module, "first_sets_of_layer", noting)
    return chosen


def places(positions: Tensor) -> list[list[list[int]]]:
    return [[sorted(unit[unit >= 0].tolist()) for unit in row] for row in positions]


def generate(model: PreTrainedModel, tokens: Tensor, padding: tuple[int, ...] = (), **more: Any) -> Tensor:
    mask = torch.ones_like(tokens)
    for row, width in enumerate(padding):
        mask[row, :width] = 0
    written: Tensor = model.generate(tokens, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, **more)
    return written[:, tokens.shape[1] :]


def alone(model: PreTrainedModel, tokens: Tensor, selection: Selection) -> tuple[list[list[list[int]]], list[int]]:
    """Of a prompt without padding: the first sets `[layer][kv_head]`, and what is written with them for ever."""
    prompt = read_prompt(model, tokens, N_NEW, prompt_queries=[selection.prompt_queries])
    sets = [places(layer)[0] for layer in prompt.first_sets(selection, 1).positions]
    rows = decode_rows(model, prompt, [NeverFull()], selection, fast=False)
    written = [int(prompt.logits.argmax())]
    while len(written) < N_NEW:
        written.append(int(rows.step(torch.tensor(written[-1:])).logits.argmax()))
    return sets, written


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"prefill_chunk_size": 9},
        {"prefill_chunk_size": 19},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 14},
        # A chunk that is all padding for one row.
        {"cache_implementation": "static", "prefill_chunk_size": 6},
    ],
    ids=str,
)
def test_first_sets_and_tokens_are_those_of_each_row_read_alone(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    first_sets: dict[int, list[list[list[int]]]],
    selection: Selection,
    how: dict[str, Any],
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT, rows=3)
    with recycled(model, NeverFull(), selection):
        written = generate(model, tokens, PADDING, **how)
    for row, width in enumerate(PADDING):
        sets, expected = alone(model, tokens[row, width:], selection)
        for layer, heads in enumerate(sets):
            assert first_sets[layer][row] == [[place + width for place in places] for places in heads]
        assert written[row].tolist() == expected


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_every_prompt_votes_for_itself(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    first_sets: dict[int, list[list[list[int]]]],
    selection: Selection,
) -> None:
    model = make_model()
    prompts = [make_tokens(n_prompt, seed=seed) for seed, n_prompt in ((1, 20), (2, 20), (3, 11), (4, 24))]
    found = []
    with recycled(model, NeverFull(), selection):
        for tokens in prompts:
            written = generate(model, tokens)[0].tolist()
            found.append(([first_sets[layer][0] for layer in (0, 1)], written))
    assert found == [alone(model, tokens[0], selection) for tokens in prompts]


def test_full_steps_choose_by_their_own_query_however_the_first_set_was_chosen(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One layer, whose keys and queries do not depend on what was attended to: after a full step all goes on alike.
    model, tokens = make_model(layers=1), make_tokens(N_PROMPT + N_NEW)
    logits = []
    for prompt_queries in (1, None):
        selection = Selection(7, sinks=1, window=2, prompt_queries=prompt_queries)
        with torch.no_grad(), recycled(model, FixedStride(4), selection):
            cache = model(tokens[:, :N_PROMPT]).past_key_values
            steps = [
                model(tokens[:, place : place + 1], past_key_values=cache).logits[0, -1]
                for place in range(N_PROMPT, N_PROMPT + N_NEW)
            ]
        logits.append(torch.stack(steps))
    gap = (logits[0] - logits[1]).abs().amax(-1)
    assert (gap[:3] > 1e-4).all()
    assert gap[3:].max() < 1e-10


def test_a_mean_over_the_layer_is_decoded_on_the_plain_path_and_the_receipt_says_so(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], fast: bool
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT)
    selection = Selection(6, 0, 0, 0, 0, "layer_mean", "updated")  # type: ignore[arg-type]
    with recycled(model, NeverFull(), selection) as session:
        written = generate(model, tokens)[0].tolist()
    receipt = session.receipt()
    assert receipt.engine == "plain"
    if fast:
        assert "the selection over those of a layer" in str(receipt.to_json())
    assert written == alone(model, tokens[0], selection)[1]
