"""Units of the plain path: what policies are not shown, and what no policy can make them do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    MEASURED_SIGNALS,
    FixedStride,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.plain.attention import GatheredSets
from recycler.decode.recycled import recycled as recycled_on_engines
from recycler.sets.recycled_set import RecycledSet

recycled = partial(recycled_on_engines, fast=False)


def decode(model: PreTrainedModel, tokens: Tensor, n_steps: int = 20) -> None:
    mask = torch.ones_like(tokens)
    mask[1:, :5] = 0
    model.generate(tokens, attention_mask=mask, max_new_tokens=n_steps + 1)


def test_signals_are_float64_and_unmeasured_ones_are_nan(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], spy: Callable[..., Any]
) -> None:
    for reads in (frozenset[str](), *(frozenset({name}) for name in sorted(MEASURED_SIGNALS))):
        spying = spy(FixedStride(2), reads)
        with recycled(make_model("llama", torch.float32), spying, Selection(8, 2, 3)):
            decode(make_model("llama", torch.float32), make_tokens(14, rows=2), n_steps=4)
        for shown in (step for layer in spying.seen.values() for step in layer):
            assert {values.dtype for name, values in shown.items() if name != "full"} == {np.dtype("float64")}
            assert all(values.shape == (2, 2) for values in shown.values())
            for name in MEASURED_SIGNALS - reads:
                assert np.isnan(shown[name]).all()
        for name in reads:
            last = spying.seen[1][-1][name]
            assert (np.abs(last) <= 1 + 1e-6).all(), name


def test_the_token_of_embeddings_is_not_known(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], spy: Callable[..., Any]
) -> None:
    model, tokens, spying = make_model(), make_tokens(18), spy(SentenceBoundary((99,)))
    embedded = model.get_input_embeddings()(tokens).detach()
    with torch.no_grad(), recycled(model, spying, Selection(8, 2, 3)):
        cache = model(tokens[:, :14]).past_key_values
        model(inputs_embeds=embedded[:, 14:15], past_key_values=cache)
        model(tokens[:, 15:16], past_key_values=cache)
        model(inputs_embeds=embedded[:, 16:17], past_key_values=cache)
        # Not through the model's own forward: nobody told what is fed.
        model.model(tokens[:, 17:], past_key_values=cache)
    shown = [step["token"][0, 0] for step in spying.seen[0]]
    np.testing.assert_array_equal(shown, [np.nan, float(tokens[0, 15]), np.nan, np.nan])
    assert [step["full"].all() for step in spying.seen[0]] == [True, False, True, True]


@pytest.mark.parametrize("unit_k", [None, ((5, 12), (6, 5))], ids=["k", "sizes"])
@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated"])
@pytest.mark.parametrize(
    "policy",
    [FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))), RefreshKeys(FixedStride(2), ((1, 0), (1, 1)))],
    ids=lambda policy: policy.kind,
)
def test_sets_in_use_hold_at_most_k_tokens_and_all_that_must_stay(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    policy: StepPolicy,
    ranking: str,
    unit_k: tuple[tuple[int, ...], ...] | None,
) -> None:
    used: list[RecycledSet] = []

    def noting(attention: GatheredSets, full: Tensor, sets: RecycledSet, **how: bool) -> Any:
        used.append(RecycledSet(sets.positions.clone(), sets.scores.clone(), sets.selection))
        return attend(attention, full, sets)

    attend = GatheredSets.attend
    monkeypatch.setattr(GatheredSets, "attend", noting)
    selection = Selection(7, sinks=2, window=3, ranking=ranking, unit_k=unit_k)
    with recycled(make_model(), policy, selection):
        decode(make_model(), make_tokens(8, rows=2))
    assert len(used) == 2 * 20
    for index, recycled_set in enumerate(used):
        newest = 8 + index // 2
        for row, start in enumerate((0, 5)):
            for head, unit in enumerate(recycled_set.positions[row]):
                held, size = unit[unit >= 0].tolist(), 7 if unit_k is None else unit_k[index % 2][head]
                assert len(held) == len(set(held)) == min(size, newest + 1 - start)
                assert {start, start + 1, newest - 2, newest - 1, newest} <= set(held)
                assert min(held) == start
                assert max(held) == newest
