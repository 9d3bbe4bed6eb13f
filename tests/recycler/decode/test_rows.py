"""Rows that decode from one prompt: on the engine and on the plain path, along a text and in their own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    NeverFull,
    RandomRefresh,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.plain.attention import MaskedSets, UnitAttention
from recycler.decode.plain.decoding import PlainDecoding
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.rows import Rows, RowsStep, decode_rows
from recycler.decode.session import recycled
from recycler.sets.recycled_set import RecycledSet

N_PROMPT, N_STEPS = 18, 20
# The engine's norms are of the model's precision, those of transformers of float32.
ATOL = 1e-5
ENDS = tuple(range(0, 61, 5))
POLICIES = (
    AlwaysFull(),
    NeverFull(),
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    CosineThreshold(0.6, check_every=2),
    LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8),
    LayerCosine(0.8, check_every=3),
    SentenceBoundary(ENDS, max_age=6),
    RandomRefresh.drawn(0.3, (2, 2), seed=0),
    RefreshKeys(FixedStride(3)),
    RefreshKeys(LearnedLogistic(("age", "refresh_loss", "refresh_churn"), (0.3, 1.0, 0.5), -1.4), ((1, 0), (0, 1))),
)
# Those by which the heads of a layer decide alike.
BY_LAYER = (
    AlwaysFull(),
    NeverFull(),
    FixedStride(4),
    LayerCosine(0.8, check_every=3),
    SentenceBoundary(ENDS, 6),
    RefreshKeys(LayerCosine(0.9, check_every=2)),
)
SELECTIONS = {
    f"{ranking}-{group}-{queries}": Selection(
        7,
        sinks=1,
        window=2,
        pool_backward=1,
        pool_forward=2,
        group=group,  # type: ignore[arg-type]
        ranking=ranking,  # type: ignore[arg-type]
        prompt_queries=queries,
    )
    for ranking in ("last_full", "updated", "accumulated")
    for group, queries in (("max", 1), ("mean", 3), ("max", None))
}
UNIT_K = ((4, 9), (6, 8))
SELECTIONS |= {
    f"{ranking}-sizes": Selection(7, 1, 2, 1, 2, ranking=ranking, unit_k=UNIT_K)  # type: ignore[arg-type]
    for ranking in ("last_full", "updated", "accumulated")
}
H2O = Selection(6, 0, 3, 0, 0, "mean", "accumulated", None)  # type: ignore[arg-type]
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


def both(
    model: PreTrainedModel, prompt: ReadPrompt, policies: Sequence[StepPolicy], selection: Selection
) -> tuple[Rows, Rows]:
    engine, plain = (decode_rows(model, prompt, policies, selection, fast=fast) for fast in (True, False))
    assert not isinstance(engine.decoding, PlainDecoding)
    assert isinstance(plain.decoding, PlainDecoding)
    return engine, plain


@pytest.mark.parametrize("selection", [*SELECTIONS.values(), H2O], ids=[*SELECTIONS, "h2o"])
def test_the_engine_and_the_plain_path_do_the_same(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], selection: Selection
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    prompt = read(model, tokens[:N_PROMPT], selection)
    engine, plain = (
        follow(rows, len(POLICIES), tokens[N_PROMPT:]) for rows in both(model, prompt, POLICIES, selection)
    )
    shares = np.mean([step.full for step in plain], axis=(0, 2, 3))
    assert (shares[0], shares[1]) == (1, 0)
    assert ((shares[2:] > 0) & (shares[2:] < 1)).all()
    for fast, slow in zip(engine, plain, strict=True):
        torch.testing.assert_close(fast.logits, slow.logits, rtol=0, atol=ATOL)
        np.testing.assert_array_equal(fast.full, slow.full)
        np.testing.assert_array_equal(fast.tokens_read, slow.tokens_read)
        assert fast.tokens_read.dtype == slow.tokens_read.dtype == np.float64
        assert fast.dense_tokens == slow.dense_tokens


def test_how_sets_are_chosen_and_ranked_shows_in_what_is_predicted(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    seen: list[Tensor] = []
    for selection in (*SELECTIONS.values(), H2O, TOVA):
        prompt = read(model, tokens[:N_PROMPT], selection)
        rows = decode_rows(model, prompt, [NeverFull()], selection)
        seen.append(torch.stack([step.logits for step in follow(rows, 1, tokens[N_PROMPT:])]))
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-3 for other in seen[:i])


def test_what_is_read_is_the_cache_or_the_set(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(6 + N_STEPS)[0]
    selection = Selection(9, sinks=1, window=2)
    prompt = read(model, tokens[:6], selection)
    for rows in both(model, prompt, POLICIES, selection):
        for step, done in enumerate(follow(rows, len(POLICIES), tokens[6:])):
            dense = 6 + step + 1
            assert done.dense_tokens == dense
            np.testing.assert_array_equal(done.tokens_read, min(9, dense) + done.full * (dense - min(9, dense)))


def test_a_keys_only_refresh_reads_all_keys_and_the_values_of_its_set_and_counts_half(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    selection, policies = (
        Selection(9, sinks=1, window=2),
        (FixedStride(3), RefreshKeys(FixedStride(3), ((1, 0), (1, 1)))),
    )
    prompt = read(model, tokens[:N_PROMPT], selection)
    for rows in both(model, prompt, policies, selection):
        for step, done in enumerate(follow(rows, 2, tokens[N_PROMPT:])):
            dense = N_PROMPT + step + 1
            whole, half = (dense, (dense + 9) / 2) if step % 3 == 2 else (9, 9)
            assert done.tokens_read.tolist() == [[[whole] * 2] * 2, [[half, whole], [half, half]]]
            full = 1 if step % 3 == 2 else 0
            assert done.full.tolist() == [[[full] * 2] * 2, [[full / 2, full], [full / 2, full / 2]]]
            assert done.full.dtype == np.float64


def test_what_is_read_of_a_set_is_its_own_size(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(6 + N_STEPS)[0]
    selection = Selection(9, sinks=1, window=2, unit_k=((3, 15), (7, 11)))
    prompt = read(model, tokens[:6], selection)
    for rows in both(model, prompt, POLICIES, selection):
        for step, done in enumerate(follow(rows, len(POLICIES), tokens[6:])):
            dense = 6 + step + 1
            sizes = np.minimum(selection.unit_k, dense)
            # A keys-only refresh counts half, and reads half of what is not in the set.
            np.testing.assert_array_equal(done.tokens_read, sizes + done.full * (dense - sizes))


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

    def noting(attention: MaskedSets, full: Tensor, sets: RecycledSet) -> UnitAttention:
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


@pytest.mark.parametrize("selection", [*SELECTIONS.values(), H2O], ids=[*SELECTIONS, "h2o"])
@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_each_row_writes_what_it_writes_alone_in_a_session(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    selection: Selection,
    fast: bool,
) -> None:
    assert_alone_as_together(make_model(), make_tokens(N_PROMPT), POLICIES, selection, fast)


def test_each_row_writes_what_it_writes_alone_where_sets_are_of_the_layer(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    assert_alone_as_together(make_model(), make_tokens(N_PROMPT), BY_LAYER, TOVA, True)


def assert_alone_as_together(
    model: PreTrainedModel, tokens: Tensor, policies: Sequence[StepPolicy], selection: Selection, fast: bool
) -> None:
    prompt = read(model, tokens[0], selection)
    together = write(decode_rows(model, prompt, policies, selection, fast=fast), prompt, len(policies))
    assert len({str(row) for row in together}) > len(policies) // 2
    for row, policy in enumerate(policies):
        with recycled(model, policy, selection, fast=fast):
            written = model.generate(tokens, max_new_tokens=N_STEPS + 1, do_sample=False)
        assert together[row] == written[0, N_PROMPT:].tolist(), policy.kind


@pytest.mark.parametrize("n_prompt", [1, 2])
def test_the_shortest_prompts_decode(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], n_prompt: int
) -> None:
    model, tokens = make_model(), make_tokens(n_prompt + N_STEPS)[0]
    prompt = read(model, tokens[:n_prompt], H2O)
    engine, plain = (follow(rows, len(POLICIES), tokens[n_prompt:]) for rows in both(model, prompt, POLICIES, H2O))
    with torch.no_grad():
        stock = model(tokens[None]).logits[0, n_prompt:]
    for place, steps in enumerate(zip(engine, plain, strict=True)):
        for step in steps:
            torch.testing.assert_close(step.logits[0], stock[place], rtol=0, atol=ATOL)
        torch.testing.assert_close(steps[0].logits, steps[1].logits, rtol=0, atol=ATOL)


def test_two_decodings_from_one_prompt_do_not_disturb_each_other(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    prompt = read(model, tokens[:N_PROMPT], H2O)
    for fast in (True, False):
        alone = follow(decode_rows(model, prompt, [FixedStride(3)], H2O, fast=fast), 1, tokens[N_PROMPT:])
        rows = [decode_rows(model, prompt, [FixedStride(3)], H2O, fast=fast) for _ in range(2)]
        for place, token in enumerate(tokens[N_PROMPT:]):
            for one in rows:
                assert torch.equal(one.step(token[None]).logits, alone[place].logits)


def test_a_policy_of_another_shape_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model = make_model()
    prompt = read(model, make_tokens(N_PROMPT)[0], H2O)
    with pytest.raises(ValueError, match=r"the policy is for 1 layers x 2 KV heads, but .* has 2 layers x 2 KV heads"):
        decode_rows(model, prompt, [NeverFull(), FixedStride(((2, 3),))], H2O)
    sized = Selection(6, 0, 3, prompt_queries=None, unit_k=((6, 6, 6),))
    with pytest.raises(ValueError, match=r"the selection is for 1 layers x 3 KV heads, but .* has 2 layers x 2 KV"):
        decode_rows(model, prompt, [NeverFull()], sized)


def test_the_model_is_stock_between_steps(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)[0]
    with torch.no_grad():
        expected = model(tokens[None]).logits
    prompt = read(model, tokens[:N_PROMPT], H2O)
    for rows in both(model, prompt, [NeverFull()], H2O):
        rows.step(tokens[N_PROMPT : N_PROMPT + 1])
        with torch.no_grad():
            assert torch.equal(model(tokens[None]).logits, expected)
