"""Keys-only refreshes: what they read, what they choose, and where they are full attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    MEASURED_SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    NeverFull,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler.decode.counts import full_counts, keys_only_units, tokens_read
from recycler.decode.engine_run import EngineRun
from recycler.decode.per_row import PerRow
from recycler.decode.receipt import Receipt
from recycler.decode.session import Session, recycled

Make = Callable[..., Any]

N_PROMPT, N_STEPS = 20, 14
SELECTION = Selection(8, sinks=1, window=2, pool_backward=1, pool_forward=2)
ALL = Selection(N_PROMPT + N_STEPS, sinks=2, window=4)
# What a batch's rows have of padding at their left.
PADDING = (0, 3, 11)
SOME = ((1, 0), (0, 1))
# In the last layer, what a unit attends to changes no unit's keys and queries.
LAST_LAYER = ((0, 0), (1, 1))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)


@pytest.fixture(params=[True, False], ids=["engine", "plain"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@dataclass
class Run:
    """Logits of decode steps `(steps, rows, vocabulary)`, the units' sets after each, and the receipt.

    A set is a dictionary from place to score, by `(layer, row, kv_head)`.
    """

    logits: list[Tensor] = field(default_factory=list)
    sets: list[dict[tuple[int, int, int], dict[int, float]]] = field(default_factory=list)
    receipt: Receipt = None  # type: ignore[assignment]


def sets_of(session: Session) -> dict[tuple[int, int, int], dict[int, float]]:
    run: Any = session._run
    if isinstance(run, EngineRun):
        states = [(units.positions, units.scores) for units in run.decoding._units]  # type: ignore[attr-defined]
        filled = [units.filled for units in run.decoding._units]  # type: ignore[attr-defined]
    else:
        kept = [units.recycled for units in run._units._layers]
        states = [(one.positions.numpy(), one.scores.numpy()) for one in kept]
        filled = None
    found = {}
    for layer, (positions, scores) in enumerate(states):
        for unit in np.ndindex(positions.shape[:2]):
            holds = positions[unit] >= 0
            if filled is not None:
                holds = np.arange(positions.shape[-1]) < filled[layer][unit]
            pairs = zip(positions[unit][holds].tolist(), scores[unit][holds].tolist(), strict=True)
            found[layer, *unit] = dict(pairs)
    return found


def decode(
    model: PreTrainedModel,
    tokens: Tensor,
    policy: StepPolicy,
    selection: Selection = SELECTION,
    *,
    fast: bool,
    n_steps: int = N_STEPS,
    padding: tuple[int, ...] = (0,),
    before_steps: Callable[[Any], None] = lambda cache: None,
) -> Run:
    """Feed tokens `(rows, n_prompt + n_steps)`, the last ones one by one."""
    n_prompt = tokens.shape[1] - n_steps
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(padding)[:, None]).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    run, cache, begin = Run(), None, 0
    with torch.no_grad(), recycled(model, policy, selection, fast=fast) as session:
        for end in range(n_prompt, tokens.shape[1] + 1):
            how = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
            output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True, **how)
            if begin == 0:
                before_steps(output.past_key_values)
            else:
                run.logits.append(output.logits[:, -1])
                run.sets.append(sets_of(session))
            cache, begin = output.past_key_values, end
    run.receipt = session.receipt()
    assert run.receipt.engine == ("cpu" if fast else "plain")
    return run


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("units", [1, SOME], ids=["all", "some"])
@pytest.mark.parametrize("policy", [AlwaysFull(), FixedStride(3), LOGISTIC], ids=lambda policy: policy.kind)
def test_a_set_as_large_as_the_context_finds_the_tokens_of_full_attention(
    make_model: Make, make_tokens: Make, fast: bool, policy: StepPolicy, units: Any, family: str
) -> None:
    model, tokens = make_model(family), make_tokens(N_PROMPT, rows=3)
    mask = (torch.arange(N_PROMPT) >= torch.tensor(PADDING)[:, None]).long()
    how = {"attention_mask": mask, "max_new_tokens": N_STEPS, "do_sample": False, "return_dict_in_generate": True}
    stock = model.generate(tokens, output_logits=True, **how)
    with recycled(model, RefreshKeys(policy, units), ALL, fast=fast) as session:
        found = model.generate(tokens, output_logits=True, **how)
    assert torch.equal(found.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(stock.logits), rtol=0, atol=1e-5)
    assert session.receipt().keys_only_share > 0
    # What is not left out of a set is read anyway.
    assert session.receipt().read_share == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_set_as_large_as_the_context_gives_the_logits_of_always_full(
    make_model: Make, make_tokens: Make, fast: bool, dtype: torch.dtype
) -> None:
    model, tokens = make_model("llama", dtype), make_tokens(N_PROMPT + N_STEPS, rows=3)
    full, keys = (
        decode(model, tokens, policy, ALL, fast=fast, padding=PADDING)
        for policy in (AlwaysFull(), RefreshKeys(AlwaysFull()))
    )
    # The same numbers in another order; in bfloat16 the plain path rounds every layer's attention, the engine logits.
    tolerance = {torch.float64: (0, 1e-12), torch.float32: (0, 2e-4), torch.bfloat16: (2**-7, 2**-3)}[dtype]
    for one, other in zip(full.logits, keys.logits, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance[0], atol=tolerance[1])
    assert (full.receipt.full_share, keys.receipt.full_share) == (1, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated"])
@pytest.mark.parametrize("group", ["max", "mean"])
def test_sets_and_measures_are_those_of_full_steps_on_the_same_path(
    make_model: Make,
    make_tokens: Make,
    spy: Callable[..., Any],
    fast: bool,
    group: str,
    ranking: str,
    dtype: torch.dtype,
) -> None:
    model, tokens = make_model("llama", dtype), make_tokens(N_PROMPT + N_STEPS, rows=3)
    selection = Selection(8, 1, 2, 1, 2, group=group, ranking=ranking)  # type: ignore[arg-type]
    # Whoever measures new sets has them chosen at once.
    stride = FixedStride(((2, 3), (3, 4)))
    spies = [spy(stride), spy(RefreshKeys(stride, LAST_LAYER))]
    full, keys = (decode(model, tokens, policy, selection, fast=fast, padding=PADDING) for policy in spies)
    for one, other in zip(full.sets, keys.sets, strict=True):
        for unit, scores in one.items():
            assert other[unit].keys() == scores.keys()
            found = [other[unit][place] for place in scores]
            np.testing.assert_allclose(found, list(scores.values()), rtol=1e-4, atol=1e-6)
    for layer, steps in spies[0].seen.items():
        for one, other in zip(steps, spies[1].seen[layer], strict=True):
            for name in ("age", "n_full", *MEASURED_SIGNALS, "full"):
                np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    assert max((one - other).abs().max() for one, other in zip(full.logits, keys.logits, strict=True)) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_outside_of_the_set_are_not_read(
    make_model: Make, make_tokens: Make, fast: bool, dtype: torch.dtype
) -> None:
    model, tokens = make_model("llama", dtype), make_tokens(N_PROMPT + N_STEPS, rows=3)
    # One refresh, at the first step; then the set of it.
    asked = FixedStride(99, phase=98)
    clean = decode(model, tokens, RefreshKeys(asked), fast=fast, padding=PADDING)

    def spoil(cache: Any) -> None:
        for (layer, row, head), scores in clean.sets[0].items():
            outside = [place for place in range(N_PROMPT) if place not in scores]
            assert len(outside) >= N_PROMPT - SELECTION.k
            cache.layers[layer].values[row, head, outside] = float("nan")

    spoilt = decode(model, tokens, RefreshKeys(asked), fast=fast, padding=PADDING, before_steps=spoil)
    assert all(logits.isfinite().all() for logits in clean.logits)
    for one, other in zip(clean.logits, spoilt.logits, strict=True):
        assert torch.equal(other, one)
    # A full step meets them; its successors' keys are not numbers.
    one_step = {"fast": fast, "n_steps": 1, "padding": PADDING, "before_steps": spoil}
    assert decode(model, tokens[:, : N_PROMPT + 1], asked, **one_step).logits[0].isnan().all()


def test_a_batch_is_its_rows_alone(make_model: Make, make_tokens: Make, fast: bool) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS, rows=3)
    policy = RefreshKeys(BudgetConstrained(CosineThreshold(0.9), 0.5, 1), SOME)
    together = decode(model, tokens, policy, fast=fast, padding=PADDING)
    for row, width in enumerate(PADDING):
        alone = decode(model, tokens[row : row + 1, width:], policy, fast=fast)
        for one, other in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(other[row], one[0], rtol=0, atol=1e-5)


def test_rows_with_and_without_the_mode_share_a_batch(make_model: Make, make_tokens: Make, fast: bool) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS, rows=3)
    rows = (RefreshKeys(LOGISTIC), LOGISTIC, RefreshKeys(FixedStride(2), SOME))
    together = decode(model, tokens, PerRow(rows), fast=fast, padding=PADDING)
    alone = [
        decode(model, tokens[row : row + 1, width:], policy, fast=fast)
        for row, (policy, width) in enumerate(zip(rows, PADDING, strict=True))
    ]
    for row, run in enumerate(alone):
        for one, other in zip(run.logits, together.logits, strict=True):
            torch.testing.assert_close(other[row], one[0], rtol=0, atol=1e-5)
    for name in ("full_steps", "keys_only_steps", "tokens_read"):
        total = sum(getattr(run.receipt, name) for run in alone)
        np.testing.assert_array_equal(getattr(together.receipt, name), total)
    assert together.receipt.keys_only_steps.sum() > 0


units_of_two_by_two = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=2, max_size=2)


@settings(max_examples=25, deadline=None)
@given(
    units=units_of_two_by_two,
    strides=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=2, max_size=2),
    k=st.integers(4, 40),
    ranking=st.sampled_from(["last_full", "updated", "accumulated"]),
    group=st.sampled_from(["max", "mean"]),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_engine_and_plain_path_agree_whatever_units_are_in_the_mode(
    make_model: Make,
    make_tokens: Make,
    units: Any,
    strides: Any,
    k: int,
    ranking: str,
    group: str,
    kv_heads: int,
    seed: int,
) -> None:
    # Tables of other shapes repeat that of two heads.
    tables = [np.tile(table, 2)[:, :kv_heads] for table in (units, strides)]
    policy = RefreshKeys(FixedStride(tables[1]), tables[0])
    selection = Selection(k, 1, 2, 1, 2, group=group, ranking=ranking)  # type: ignore[arg-type]
    model, tokens = make_model(kv_heads=kv_heads), make_tokens(N_PROMPT + N_STEPS, rows=3, seed=seed)
    engine, plain = (decode(model, tokens, policy, selection, fast=fast, padding=PADDING) for fast in (True, False))
    for one, other in zip(plain.logits, engine.logits, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    for name in ("full_steps", "keys_only_steps", "tokens_read", "tokens_dense"):
        np.testing.assert_array_equal(getattr(engine.receipt, name), getattr(plain.receipt, name))


def test_a_choice_put_off_is_not_disturbed_by_units_that_choose_at_once(
    make_model: Make, make_tokens: Make, plain_decoder: Callable[..., Any], fast: bool
) -> None:
    # In one layer a head runs a full step where the other refreshes, and is recycled at the next.
    policy = RefreshKeys(FixedStride(2), SOME)
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)
    from recycler.model.attention_hook import attention_replaced

    plain, cache, expected = plain_decoder(policy, SELECTION, [0]), None, []
    with torch.no_grad(), attention_replaced(model, plain.attention):
        for part in tokens.split([N_PROMPT, *[1] * N_STEPS], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache, _ = output.past_key_values, expected.append(output.logits[:, -1])
    found = decode(model, tokens, policy, fast=fast)
    for one, other in zip(expected[1:], found.logits, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 if fast else 1e-10)


class TestUnits:
    def test_one_policy_makes_one_row(self) -> None:
        assert keys_only_units(AlwaysFull(), (1, 2, 3)).tolist() == [[[False] * 3] * 2]
        assert keys_only_units(RefreshKeys(NeverFull()), (1, 2, 3)).tolist() == [[[True] * 3] * 2]
        assert keys_only_units(RefreshKeys(NeverFull(), SOME), (1, 2, 2)).tolist() == [[[True, False], [False, True]]]

    def test_policies_of_their_own_make_rows_of_their_own(self) -> None:
        rows = PerRow((AlwaysFull(), RefreshKeys(AlwaysFull(), SOME), RefreshKeys(AlwaysFull())))
        found = keys_only_units(rows, (3, 2, 2))
        assert found.tolist() == [[[False] * 2] * 2, [[True, False], [False, True]], [[True] * 2] * 2]


class TestCounts:
    FULL, KEYS = np.array([False, True, True]), np.array([False, False, True])

    def test_a_refresh_counts_half_a_full_step(self) -> None:
        assert full_counts(self.FULL, self.KEYS).tolist() == [0, 1, 0.5]

    @given(dense=st.integers(0, 10**6), in_set=st.integers(0, 10**4))
    def test_a_refresh_reads_all_keys_and_the_values_of_the_set(self, dense: int, in_set: int) -> None:
        read = tokens_read(self.FULL, self.KEYS, np.array(dense), np.array([in_set] * 3))
        assert read.tolist() == [in_set, dense, (dense + in_set) / 2]
