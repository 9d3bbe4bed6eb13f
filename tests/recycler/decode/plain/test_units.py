"""Units: what policies are shown, and what no policy can make them do."""

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
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.plain.attention import GatheredSets
from recycler.decode.session import recycled
from recycler.model.attention_hook import attention_replaced
from recycler.sets.recycled_set import RecycledSet

NAMES = ("step", "age", "n_full", *sorted(MEASURED_SIGNALS))


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


def decode(model: PreTrainedModel, tokens: Tensor, n_steps: int = 20) -> None:
    mask = torch.ones_like(tokens)
    mask[1:, :5] = 0
    model.generate(tokens, attention_mask=mask, max_new_tokens=n_steps + 1)


POLICIES = [
    AlwaysFull(),
    NeverFull(),
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    MaxAge(CosineThreshold(0.5), ((3, 4), (5, 6))),
    LayerCosine(0.75, check_every=2),
    LearnedLogistic(("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.1, 1, 1, 1, 1), -2.0),
    RefreshKeys(FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))), ((1, 0), (1, 1))),
    RefreshKeys(LearnedLogistic(("age", "refresh_loss", "refresh_churn"), (0.1, 1, 1), -0.97)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize(
    "selection",
    [
        Selection(8, sinks=2, window=3, pool_forward=2),
        Selection(6, sinks=0, window=0, pool_backward=1, group="mean", ranking="updated"),
        Selection(3, sinks=1, window=2, ranking="updated"),
        Selection(20, sinks=2, window=3),
        Selection(8, sinks=2, window=3, pool_forward=2, unit_k=((5, 12), (8, 6))),
        Selection(6, sinks=0, window=0, group="mean", ranking="updated", unit_k=((1, 9), (4, 10))),
    ],
    ids=["window", "bare", "tiny", "not full at first", "sizes", "sizes, updated"],
)
def test_policies_are_shown_what_a_plain_decoder_measures(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    plain_decoder: Callable[..., Any],
    spy: Callable[..., Any],
    policy: StepPolicy,
    selection: Selection,
    fast: bool,
) -> None:
    # transformers' norms round to float32 in every model; the engine's do not.
    tolerance = 1e-5 if fast else 1e-10
    model, tokens = make_model(), make_tokens(14, rows=2)
    plain = plain_decoder(policy, selection, [0, 5])
    with attention_replaced(model, plain.attention):
        decode(model, tokens)
    spying = spy(policy)
    with recycled(model, spying, selection):
        decode(model, tokens)
    for layer in (0, 1):
        assert len(spying.seen[layer]) == len(plain.seen[layer]) == 20
        for shown, expected in zip(spying.seen[layer], plain.seen[layer], strict=True):
            for name in (*NAMES, "full"):
                np.testing.assert_allclose(shown[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


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


def test_a_layers_similarity_is_that_of_the_mean_queries_of_all_its_heads(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], spy: Callable[..., Any], fast: bool
) -> None:
    model, tokens, queries = make_model(kv_heads=2), make_tokens(14, rows=2), list[Tensor]()
    spying = spy(LayerCosine(0.9, check_every=3))

    def looking_on(stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module.layer_idx == 0:
                # The first layer's queries depend on the tokens alone, not on what was attended to.
                queries.append(query[:, :, -1].mean(1))
            return stock(module, query, *args, **kwargs)

        return attend

    with recycled(model, spying, Selection(8, 2, 3)):
        written = model.generate(tokens, max_new_tokens=13)
    with torch.no_grad(), attention_replaced(model, looking_on):
        for end in range(14, 27):
            model(written[:, :end])
    last_full, n_full = [queries[0][row] for row in (0, 1)], 0
    for step, (shown, now) in enumerate(zip(spying.seen[0], queries[1:], strict=True)):
        for row in (0, 1):
            cosine = float(torch.cosine_similarity(now[row], last_full[row], dim=0))
            np.testing.assert_allclose(shown["layer_similarity"][row], [cosine] * 2, rtol=0, atol=1e-5)
            full = (step + 1) % 3 == 0 and cosine < 0.9
            assert shown["full"][row].tolist() == [full] * 2
            if full:
                last_full[row], n_full = now[row], n_full + 1
    assert n_full > 2


def test_policies_are_shown_the_token_that_is_fed(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], spy: Callable[..., Any]
) -> None:
    model, tokens, spying = make_model(), make_tokens(14, rows=2), spy(FixedStride(3))
    with recycled(model, spying, Selection(8, 2, 3)):
        written = model.generate(tokens, max_new_tokens=9)
    # The last token that is written is fed to nobody.
    fed = written[:, 14:-1].double().numpy()
    for layer in (0, 1):
        shown = np.stack([step["token"] for step in spying.seen[layer]], axis=1)
        np.testing.assert_array_equal(shown, np.repeat(fed[:, :, None], 2, axis=2))


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


@pytest.mark.parametrize("asked", [AlwaysFull(), MaxAge(CosineThreshold(0.6), 4)], ids=lambda policy: policy.kind)
@pytest.mark.parametrize("burst", [0, 2.5])
def test_budget_holds_at_every_prefix(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    spy: Callable[..., Any],
    asked: StepPolicy,
    burst: float,
) -> None:
    budget = ((0.1, 0.35), (0.0, 0.7))
    spying = spy(BudgetConstrained(asked, budget, burst))
    with recycled(make_model(), spying, Selection(8, 2, 3)):
        decode(make_model(), make_tokens(14, rows=3), n_steps=60)
    for layer, steps in spying.seen.items():
        taken = np.cumsum([step["full"] for step in steps], axis=0)
        allowed = np.array(budget[layer]) * np.arange(1, 61)[:, None, None] + burst
        assert (taken <= allowed + 1e-9).all()
        if isinstance(asked, AlwaysFull):
            assert (taken == np.floor(allowed + 1e-9).clip(max=np.arange(1, 61)[:, None, None])).all()


@pytest.mark.parametrize("unit_k", [None, ((5, 12), (6, 5))], ids=["k", "sizes"])
@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_sets_in_use_hold_at_most_k_tokens_and_all_that_must_stay(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    policy: StepPolicy,
    ranking: str,
    unit_k: tuple[tuple[int, ...], ...] | None,
) -> None:
    used: list[RecycledSet] = []

    def noting(attention: GatheredSets, full: Tensor, sets: RecycledSet) -> Any:
        used.append(RecycledSet(sets.positions.clone(), sets.scores.clone(), sets.selection))
        return attend(attention, full, sets)

    attend = GatheredSets.attend
    monkeypatch.setattr(GatheredSets, "attend", noting)
    selection = Selection(7, sinks=2, window=3, ranking=ranking, unit_k=unit_k)
    with recycled(make_model(), policy, selection, fast=False):
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
