"""What every engine does, whatever it runs on. An engine joins by a line in `conftest.SUBJECTS`."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from policies import (
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RandomRefresh,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.per_row import PerRow

Make = Callable[..., Any]

N_PROMPT = 20
SOME_UNITS = ((1, 0), (0, 1))
LOGISTIC = LearnedLogistic(
    ("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 0.2, 1.0, 0.5), -1.8
)
BUDGET = BudgetConstrained(MaxAge(CosineThreshold(0.9), ((5, 6), (4, 5))), ((0.4, 0.3), (0.6, 0.5)), 1)
# The first ones meet every engine: by keys in some units, with accounts; by a layer's similarity; by all measures.
POLICIES: tuple[StepPolicy, ...] = (
    RefreshKeys(BUDGET, SOME_UNITS),
    LayerCosine(0.8, check_every=2),
    LOGISTIC,
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    # One form, other numbers; every unit runs full several times in a row before it next runs recycled.
    FixedStride(((1.2, 1.5), (1.4, 1.1))),
    RefreshKeys(FixedStride(3)),
    AlwaysFull(),
    NeverFull(),
    BUDGET,
    CosineThreshold(0.6, check_every=2),
    SentenceBoundary(tuple(range(0, 61, 5)), max_age=6),
    RandomRefresh.drawn(0.3, (2, 2), seed=0),
    RefreshKeys(LearnedLogistic(("age", "refresh_loss", "refresh_churn"), (0.3, 1.0, 0.5), -1.4)),
)
UNIT_K = ((4, 9), (6, 8))
SELECTIONS = {
    "updated, a size per unit": Selection(9, 1, 3, group="mean", ranking="updated", unit_k=((4, 14), (11, 7))),
    "decayed": Selection(9, 1, 3, ranking="decayed", score_decay=0.7, unit_k=((4, 14), (11, 7))),
    "last_full, voted by 4": Selection(7, 1, 2, 1, 2, prompt_queries=4),
    "accumulated": Selection(9, 1, 3, ranking="accumulated"),
    "last_full": Selection(12, 2, 4, 1, 2),
    "last_full, mean": Selection(7, 1, 2, 1, 2, group="mean", prompt_queries=3),
    "last_full, a size per unit": Selection(7, 1, 2, 1, 2, unit_k=UNIT_K),
    "updated": Selection(7, 1, 2, 1, 2, ranking="updated"),
    "updated, bare": Selection(3, 1, 2, ranking="updated"),
    "updated, voted by all": Selection(7, 1, 2, 1, 2, ranking="updated", prompt_queries=None),
    "accumulated, mean, a size per unit": Selection(7, 1, 2, group="mean", ranking="accumulated", unit_k=UNIT_K),
    "h2o": Selection(6, 0, 3, 0, 0, "mean", "accumulated", None),  # type: ignore[arg-type]
    "no sinks and no window": Selection(6, 0, 0, pool_backward=1, group="mean", ranking="updated"),
    "not full at first": Selection(30, 2, 3, unit_k=((24, 30), (36, 30))),
}
FAMILIES: tuple[dict[str, Any], ...] = (
    {"family": "qwen3", "head_dim": 16},
    {"family": "llama", "kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    {"family": "qwen2", "kv_heads": 1},
    {"family": "mistral", "sliding_window": None},
)


def cases(name: str, values: Sequence[Any], n_first: int, ids: Sequence[str] | None = None) -> pytest.MarkDecorator:
    """One parameter: the first values for every engine, the others where steps are quick."""
    labels = ids or [value.kind if isinstance(value, StepPolicy) else str(value) for value in values]
    further = [()] * n_first + [(pytest.mark.further_case,)] * (len(values) - n_first)
    parameters = zip(values, further, labels, strict=True)
    return pytest.mark.parametrize(name, [pytest.param(value, marks=marks, id=id) for value, marks, id in parameters])


def selection_for(policy: StepPolicy) -> Selection:
    """One of three, in turn; rows of one prompt meet all of them."""
    return [*SELECTIONS.values()][POLICIES.index(policy) % 3]


def generate(model: Any, tokens: Tensor, padding: Sequence[int], n_steps: int, **how: Any) -> list[list[int]]:
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(padding)[:, None]).long()
    torch.manual_seed(5)
    found = model.generate(
        tokens.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=n_steps + 1, **how
    )
    written: list[list[int]] = found[:, tokens.shape[1] :].tolist()
    return written


def batch(runs: Any, make_tokens: Make) -> Tensor:
    """Prompts and the text that follows, a row for each."""
    tokens: Tensor = make_tokens(N_PROMPT + runs.subject.n_steps, runs.subject.n_rows)
    return tokens


def assert_close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


# Full attention


@cases("how", [{"family": "llama"}, *FAMILIES], n_first=1)
@cases("sampling", [{}, {"do_sample": True, "temperature": 2.0}], n_first=1, ids=["greedy", "sampled"])
def test_always_full_is_the_stock_decoder(
    runs: Any, make_tokens: Make, how: dict[str, Any], sampling: dict[str, Any]
) -> None:
    model, tokens, n_steps = runs.model(**({"dtype": torch.float32} | how)), make_tokens(N_PROMPT, 2), 8
    stock = generate(model, tokens, (0, 5), n_steps, **sampling)
    with runs.session(model, AlwaysFull(), SELECTIONS["last_full"]) as session:
        assert generate(model, tokens, (0, 5), n_steps, **sampling) == stock
    receipt = session.receipt()
    assert (receipt.engine, receipt.full_share, receipt.read_share) == (runs.subject.name, 1, 1)
    assert len({token for row in stock for token in row}) > 5


@cases("policy", [RefreshKeys(LOGISTIC, SOME_UNITS), NeverFull(), RefreshKeys(AlwaysFull())], n_first=1)
@cases(
    "selection",
    [
        Selection(99, ranking="updated"),
        Selection(N_PROMPT + 20, sinks=2, window=4),
        Selection(60, 2, 4, unit_k=((40, 50), (99, 51))),
        Selection(60, 2, 4, ranking="accumulated", unit_k=((40, 50), (99, 51))),
    ],
    n_first=1,
    ids=["updated", "just enough", "a size per unit", "accumulated"],
)
def test_a_set_as_large_as_the_context_is_full_attention(
    runs: Any, make_tokens: Make, policy: StepPolicy, selection: Selection
) -> None:
    model, tokens = runs.model(), batch(runs, make_tokens)
    full, recycled = (runs.follow(model, one, selection, tokens, N_PROMPT) for one in (AlwaysFull(), policy))
    assert_close(recycled.logits, full.logits, runs.subject.atol)
    # What is not left out of a set is read anyway.
    assert recycled.receipt.read_share == 1
    assert recycled.receipt.full_share < 1 == full.receipt.full_share


# A decoder in plain Python


@cases("policy", POLICIES, n_first=3)
def test_a_batch_decodes_as_in_plain_python(runs: Any, reference: Make, make_tokens: Make, policy: StepPolicy) -> None:
    selection = selection_for(policy)
    model, tokens = runs.model(), batch(runs, make_tokens)
    expected = reference(model, policy, selection, tokens, N_PROMPT)
    found = runs.follow(model, policy, selection, tokens, N_PROMPT)
    assert_close(found.logits, expected.logits, runs.subject.atol)
    expected.assert_counted_by(found.receipt)


@cases("how", FAMILIES, n_first=2)
def test_every_family_decodes_as_in_plain_python(
    runs: Any, reference: Make, make_tokens: Make, how: dict[str, Any]
) -> None:
    model, tokens = runs.model(**how), make_tokens(N_PROMPT + min(runs.subject.n_steps, 12), 2)
    asked = (model, RefreshKeys(LOGISTIC, 1), SELECTIONS["last_full"], tokens, N_PROMPT)
    expected, found = reference(*asked), runs.follow(*asked)
    assert_close(found.logits, expected.logits, runs.subject.atol)
    expected.assert_counted_by(found.receipt)


@cases("selection", [*SELECTIONS.values()], n_first=1, ids=[*SELECTIONS])
def test_rows_of_one_prompt_decode_as_in_plain_python(
    runs: Any, reference_rows: Make, make_tokens: Make, selection: Selection
) -> None:
    policies = POLICIES if runs.subject.thorough else POLICIES[:5]
    model, text = runs.model(), make_tokens(N_PROMPT + runs.subject.n_steps)[0]
    expected = reference_rows(model, policies, selection, text, N_PROMPT)
    found = runs.follow_rows(model, policies, selection, text, N_PROMPT)
    assert_close(found.logits, expected.logits, runs.subject.atol)
    np.testing.assert_array_equal(found.full, expected.full_counts)
    np.testing.assert_array_equal(found.tokens_read, expected.seen["tokens_read"])
    assert found.full.dtype == found.tokens_read.dtype == np.float64


def test_the_policies_decide_unlike_each_other_and_selections_predict_unlike_each_other(
    runs: Any, reference_rows: Make, make_tokens: Make
) -> None:
    model, text = runs.model(), make_tokens(N_PROMPT + runs.subject.n_steps)[0]
    policies = POLICIES if runs.subject.thorough else POLICIES[:5]
    selections = [*SELECTIONS.values()][: None if runs.subject.thorough else 1]
    done = [reference_rows(model, policies, selection, text, N_PROMPT) for selection in selections]
    decided = done[-1].seen["full"] + done[-1].seen["keys_only"] * 2
    assert len({row.tobytes() for row in decided.swapaxes(0, 1)}) == len(policies)
    assert all((one.logits - other.logits).abs().max() > 1e-3 for i, one in enumerate(done) for other in done[:i])


@pytest.mark.filterwarnings("ignore:the policy spy is called on the host")
@cases("policy", POLICIES, n_first=1)
def test_policies_are_shown_what_plain_python_measures(
    runs: Any, reference: Make, spy: Make, make_tokens: Make, policy: StepPolicy
) -> None:
    selection, spying = selection_for(policy), spy(policy)
    model, tokens = runs.model(), batch(runs, make_tokens)
    expected = reference(model, policy, selection, tokens, N_PROMPT)
    runs.follow(model, spying, selection, tokens, N_PROMPT)
    for name in (*SIGNALS, "full"):
        shown = np.stack([[step[name] for step in spying.seen[layer]] for layer in (0, 1)]).transpose(1, 2, 0, 3)
        np.testing.assert_allclose(shown, expected.seen[name], rtol=0, atol=runs.subject.atol, err_msg=name)
        assert shown.dtype == (bool if name == "full" else np.float64)


@pytest.mark.filterwarnings("ignore:the policy budget_constrained is called on the host")
@pytest.mark.parametrize("reads_query", [True, False], ids=["asked within layers", "asked between steps"])
def test_a_policy_that_is_no_program_decodes_as_in_plain_python(
    runs: Any, reference: Make, make_tokens: Make, asks_for_the_layer: Make, reads_query: bool
) -> None:
    policy = BudgetConstrained(asks_for_the_layer(reads_query), 0.4)
    model, tokens = runs.model(), make_tokens(N_PROMPT + runs.subject.n_steps)
    expected = reference(model, policy, SELECTIONS["last_full"], tokens, N_PROMPT)
    found = runs.follow(model, policy, SELECTIONS["last_full"], tokens, N_PROMPT)
    assert_close(found.logits, expected.logits, runs.subject.atol)
    expected.assert_counted_by(found.receipt)
    assert found.receipt.reasons["budget"].any()
    assert found.receipt.full_steps.any()


@pytest.mark.parametrize("n_prompt", [1, 2])
def test_the_shortest_prompts_decode_as_in_plain_python(
    runs: Any, reference_rows: Make, make_tokens: Make, n_prompt: int
) -> None:
    model, text = runs.model(), make_tokens(n_prompt + runs.subject.n_steps)[0]
    asked = (model, POLICIES[1:3], Selection(4, 1, 2, prompt_queries=None), text, n_prompt)
    assert_close(runs.follow_rows(*asked).logits, reference_rows(*asked).logits, runs.subject.atol)


def test_the_cache_grows_and_nothing_is_lost(
    runs: Any, reference: Make, make_tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recycler.decode.cache._LEAST_ROOM_TOKENS", 3)
    model, tokens = runs.model(), make_tokens(N_PROMPT + 2 * runs.subject.n_steps)
    policy = RefreshKeys(FixedStride(2, ((0, 1), (1, 0))), SOME_UNITS)
    asked = (model, policy, SELECTIONS["last_full"], tokens, N_PROMPT)
    assert_close(runs.follow(*asked).logits, reference(*asked).logits, runs.subject.atol)


# Rows


def test_a_batch_is_its_rows_alone(runs: Any, make_tokens: Make) -> None:
    model, tokens = runs.model(), batch(runs, make_tokens)
    policies, selection = POLICIES[: runs.subject.n_rows], SELECTIONS["updated, a size per unit"]
    together = runs.follow(model, PerRow(policies), selection, tokens, N_PROMPT)
    alone = [
        runs.follow(model, policy, selection, tokens[row : row + 1, width:], N_PROMPT - width)
        for row, (policy, width) in enumerate(zip(policies, runs.padding, strict=False))
    ]
    assert_close(together.logits, torch.cat([run.logits for run in alone], dim=1), runs.subject.atol)
    for name in ("full_steps", "keys_only_steps", "tokens_read"):
        total = sum(getattr(run.receipt, name) for run in alone)
        np.testing.assert_array_equal(getattr(together.receipt, name), total, err_msg=name)


def test_rows_of_one_prompt_write_what_they_write_alone_in_generate(runs: Any, make_tokens: Make) -> None:
    model, prompt, n_steps = runs.model(), make_tokens(N_PROMPT), runs.subject.n_steps
    policies = POLICIES if runs.subject.thorough else POLICIES[:2]
    selection = SELECTIONS["last_full, voted by 4"]
    with torch.no_grad():
        first = int(model(prompt.to(model.device)).logits[0, -1].argmax())
    rows, tokens = runs.rows(model, policies, selection, prompt[0], n_steps), torch.full((len(policies),), first)
    written = [tokens]
    for _ in range(n_steps):
        written.append(rows.step(written[-1].to(model.device)).logits.argmax(-1).cpu())
    for policy, together in zip(policies, torch.stack(written, dim=1).tolist(), strict=True):
        with runs.session(model, policy, selection):
            assert generate(model, prompt, (0,), n_steps, do_sample=False) == [together], policy.kind


def test_rows_of_several_prompts_are_each_what_they_are_after_their_own(runs: Any, make_tokens: Make) -> None:
    model, tokens = runs.model(), make_tokens(N_PROMPT + 4, rows=2)
    policies, selection = POLICIES[:2], SELECTIONS["decayed"]
    together = runs.follow_rows(model, policies, selection, tokens, N_PROMPT)
    for text, one in enumerate(tokens):
        alone = runs.follow_rows(model, policies, selection, one, N_PROMPT)
        assert_close(together.logits[:, text::2], alone.logits, runs.subject.atol)
        np.testing.assert_array_equal(together.full[:, text::2], alone.full)
        np.testing.assert_array_equal(together.tokens_read[:, text::2], alone.tokens_read)


def test_decodings_from_one_prompt_do_not_disturb_each_other_nor_the_model(runs: Any, make_tokens: Make) -> None:
    model, tokens = runs.model(), make_tokens(N_PROMPT + 4)[0].to(runs.subject.device)
    prompt, text, selection = tokens[:N_PROMPT], tokens[N_PROMPT:], SELECTIONS["updated, a size per unit"]
    with torch.no_grad():
        stock = model(tokens[None]).logits
    alone, one, other = (runs.rows(model, [LOGISTIC], selection, prompt, 4) for _ in range(3))
    expected = [alone.step(token[None]).logits for token in text]
    for token, logits in zip(text, expected, strict=True):
        for rows in (one, other):
            assert torch.equal(rows.step(token[None]).logits, logits)
            with torch.no_grad():
                assert torch.equal(model(tokens[None]).logits, stock)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_another_number_of_rows_than_policies_is_refused(runs: Any, make_tokens: Make, n_rows: int) -> None:
    model, tokens = runs.model(), make_tokens(N_PROMPT + 1, n_rows)
    with pytest.raises(ValueError, match=f"^2 policies cannot decide for a batch of {n_rows} rows"):
        runs.follow(model, PerRow(POLICIES[:2]), SELECTIONS["last_full"], tokens, N_PROMPT, padding=(0,) * n_rows)


# Receipts, counted by hand


@pytest.fixture
def receipt_of(runs: Any, make_tokens: Make) -> Make:
    def receipt_of(policy: StepPolicy, n_steps: int, padding: tuple[int, ...] = (0,)) -> Any:
        tokens = make_tokens(20 + n_steps, rows=len(padding))
        return runs.follow(runs.model(), policy, Selection(8, sinks=2, window=3), tokens, 20, padding=padding).receipt

    return receipt_of


def test_strides_and_phases_are_counted_per_unit(receipt_of: Make) -> None:
    receipt = receipt_of(FixedStride(((1, 4), (10, 100)), ((0, 1), (8, 0))), 10)
    # Step s runs full when s + 1 + phase is a multiple of the stride: all; 2, 6; 1; none.
    assert receipt.full_steps.tolist() == [[10, 2], [1, 0]]
    # A full step s reads the 20 + s + 1 tokens there are, a recycled one 8.
    dense = sum(range(21, 31))
    assert receipt.tokens_dense.tolist() == [[dense] * 2] * 2
    assert receipt.tokens_read.tolist() == [[dense, 8 * 8 + 23 + 27], [9 * 8 + 22, 10 * 8]]
    assert receipt.unit_full_share.tolist() == [[1, 0.2], [0.1, 0]]
    assert receipt.full_share == pytest.approx(13 / 40)
    assert receipt.read_share == (dense + 114 + 94 + 80) / (4 * dense)
    assert (receipt.n_steps, receipt.n_rows, receipt.row_steps) == (10, 1, 10)
    assert receipt.reasons == {}


def test_padding_is_not_counted_as_read(receipt_of: Make) -> None:
    receipt = receipt_of(FixedStride(3), 4, padding=(0, 16))
    # Step 2 is full. The second row has 4 tokens, and 5, 6, 8 in its set afterwards.
    assert receipt.full_steps.tolist() == [[2, 2], [2, 2]]
    assert receipt.tokens_dense.tolist() == [[21 + 22 + 23 + 24 + 5 + 6 + 7 + 8] * 2] * 2
    assert receipt.tokens_read.tolist() == [[8 + 8 + 23 + 8 + 5 + 6 + 7 + 8] * 2] * 2
    assert (receipt.n_steps, receipt.n_rows, receipt.row_steps) == (4, 2, 8)


def test_keys_only_refreshes_are_counted_by_themselves_and_half(receipt_of: Make) -> None:
    receipt = receipt_of(RefreshKeys(FixedStride(((1, 4), (10, 100)), ((0, 1), (8, 0))), ((0, 1), (1, 1))), 10)
    assert receipt.full_steps.tolist() == [[10, 2], [1, 0]]
    assert receipt.keys_only_steps.tolist() == [[0, 2], [1, 0]]
    # A refresh at step s reads the keys of 20 + s + 1 tokens and the values of 8.
    dense = sum(range(21, 31))
    refreshes = (23 + 8) / 2 + (27 + 8) / 2
    assert receipt.tokens_read.tolist() == [[dense, 8 * 8 + refreshes], [9 * 8 + (22 + 8) / 2, 10 * 8]]
    assert receipt.unit_full_share.tolist() == [[1, 0.1], [0.05, 0]]
    assert receipt.full_share == pytest.approx(11.5 / 40)
    assert receipt.keys_only_share == pytest.approx(3 / 40)
    assert receipt.read_share == (dense + 64 + refreshes + 87 + 80) / (4 * dense)


def test_reasons_tell_who_overruled_the_policy(receipt_of: Make) -> None:
    forced = receipt_of(MaxAge(NeverFull(), ((2, 5), (1, 100))), 5, padding=(0, 3))
    assert {reason: units.tolist() for reason, units in forced.reasons.items()} == {"max_age": [[4, 2], [10, 0]]}
    both = receipt_of(MaxAge(BudgetConstrained(AlwaysFull(), 0.1), 4), 10)
    assert both.full_steps[0, 0] == 2
    # Forced at steps 3 and 7; so, when the budget would allow its first step, 9, the bucket is overdrawn.
    assert {reason: units[0, 0] for reason, units in both.reasons.items()} == {"budget": 10, "max_age": 2}


@pytest.mark.parametrize("burst", [0, 2.5])
def test_a_budget_holds_at_every_prefix(runs: Any, make_tokens: Make, burst: float) -> None:
    budget, taken, n_steps = np.array(((0.1, 0.35), (0.0, 0.7))), [], 3 * runs.subject.n_steps
    policy = BudgetConstrained(AlwaysFull(), budget.tolist(), burst)
    runs.follow(
        runs.model(),
        policy,
        SELECTIONS["last_full"],
        make_tokens(N_PROMPT + n_steps),
        N_PROMPT,
        after_step=lambda session, cache: taken.append(session.receipt().full_steps),
    )
    steps = np.arange(1, n_steps + 1)[:, None, None]
    assert np.array_equal(np.stack(taken[1:]), np.floor(budget * steps + burst + 1e-9).clip(max=steps))


# Replay


@cases("policy", [FixedStride(((1.1, 2.5), (3, 4)), 0.5), POLICIES[0], LOGISTIC, *POLICIES[10:]], n_first=3)
def test_replay_decides_as_the_decoder_does(runs: Any, make_tokens: Make, policy: StepPolicy) -> None:
    # A machine that is lent for its GPU has no optuna.
    pytest.importorskip("optuna")
    from recycler import Prompt, record_trace
    from tuning import replay_policy

    # Sets that hold everything keep the decoder on the recorded path.
    n_steps = min(runs.subject.n_steps, 12)
    model, tokens, everything = runs.model(), make_tokens(N_PROMPT + n_steps, seed=2), Selection(60)
    prompt = Prompt("drawn", "random", tokens[0].numpy(), N_PROMPT, "drawn", "CC0-1.0")
    replayed = replay_policy(record_trace(model, prompt, everything, max_age=n_steps), policy).full[:, 0]
    taken: list[np.ndarray] = []
    runs.follow(
        model,
        policy,
        everything,
        tokens,
        N_PROMPT,
        after_step=lambda session, cache: taken.append(session.receipt().full_steps),
    )
    assert 0 < replayed.mean() < 1
    np.testing.assert_array_equal(np.diff(np.stack([np.zeros_like(taken[1]), *taken[1:]]), axis=0), replayed)


# What is read, and how exactly


# What Triton's interpreter says of a full step's numbers.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("policy", [NeverFull(), RefreshKeys(FixedStride(99, phase=98))], ids=["recycled", "by keys"])
def test_values_outside_of_the_sets_are_not_read(
    runs: Any, reference: Make, make_tokens: Make, policy: StepPolicy
) -> None:
    model, tokens = runs.model(), batch(runs, make_tokens)
    selection, n_spoilt = Selection(8, 1, 2, 1, 2), list[int]()
    expected = reference(model, policy, selection, tokens, N_PROMPT)

    def spoil(session: Any, cache: Any) -> None:
        if cache.get_seq_length() > N_PROMPT:
            return
        for (layer, row, head), read in expected.values_read.items():
            outside = sorted(set(range(N_PROMPT)) - read)
            cache.layers[layer].values[row, head, outside] = float("nan")
            n_spoilt.append(len(outside))

    found = runs.follow(model, policy, selection, tokens, N_PROMPT, after_step=spoil)
    assert min(n_spoilt) >= N_PROMPT - 10
    assert_close(found.logits, expected.logits, runs.subject.atol)
    # A full step meets them; what follows is no number either.
    first = (selection, tokens[:, : N_PROMPT + 1], N_PROMPT)
    with pytest.warns(UserWarning, match="NaN among its logits"):
        assert runs.follow(model, AlwaysFull(), *first, after_step=spoil).logits.isnan().all()


def test_in_narrow_types_it_is_as_close_to_exact_as_the_plain_path(
    runs: Any, reference: Make, make_tokens: Make
) -> None:
    for dtype in runs.subject.narrow:
        model, tokens = runs.model(dtype=dtype), batch(runs, make_tokens)
        how = (FixedStride(3), SELECTIONS["last_full, a size per unit"], tokens, N_PROMPT)
        exact = reference(copy.deepcopy(model).double(), *how).logits
        found, plain = (one.follow(model, *how) for one in (runs, runs.plainly()))
        np.testing.assert_array_equal(found.receipt.tokens_read, plain.receipt.tokens_read)
        error, plain_error = ((run.logits.double() - exact).abs().mean() for run in (found, plain))
        assert found.logits.dtype == dtype
        assert 0 < error <= 1.2 * plain_error


# Runs


def test_a_run_that_has_ended_keeps_no_cache_alive(runs: Any, make_tokens: Make) -> None:
    model, tokens = runs.model(), make_tokens(N_PROMPT).to(runs.subject.device)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), runs.session(model, FixedStride(2), SELECTIONS["last_full"]) as session:
            cache = model(tokens, use_cache=True).past_key_values
            model(tokens[:, :1], past_key_values=cache)
        kept = weakref.ref(cache.layers[0])
        del cache
        # No cycles: counting references is enough.
        assert kept() is None
    finally:
        gc.enable()
    assert session.receipt().n_steps == 1


@cases("asked", [{"output_hidden_states": True}, {"labels": torch.tensor([[1]])}], n_first=1)
def test_a_run_does_not_leave_the_engine_in_the_middle(runs: Any, make_tokens: Make, asked: dict[str, Any]) -> None:
    if runs.subject.engine is None:
        pytest.skip("a session without an engine runs whatever the model's own forward takes")
    model, token = runs.model(), make_tokens(1).to(runs.subject.device)
    sentence = (
        f"a decode step cannot leave the {runs.subject.name} engine, and the call passes {next(iter(asked))}: "
        "use recycled(..., fast=False)."
    )
    with torch.no_grad(), runs.session(model, AlwaysFull(), SELECTIONS["last_full"]) as session:
        cache = model(make_tokens(N_PROMPT).to(model.device)).past_key_values
        model(token, past_key_values=cache)
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            model(token, past_key_values=cache, **asked)
        # Nothing has happened to the cache: the run goes on.
        model(token, past_key_values=cache)
    assert session.receipt().n_steps == 2


def test_a_sliding_window_that_is_full_is_refused(runs: Any, make_tokens: Make) -> None:
    model, text = runs.model("mistral", sliding_window=N_PROMPT + 2), make_tokens(N_PROMPT + 8)[0]
    with pytest.raises(ValueError, match=f"sliding window of {N_PROMPT + 2} tokens"):
        runs.follow_rows(model, [NeverFull()], SELECTIONS["last_full"], text, N_PROMPT)


def test_policies_and_sizes_of_another_model_are_refused(runs: Any, make_tokens: Make) -> None:
    model, prompt, selection = runs.model(), make_tokens(N_PROMPT)[0], SELECTIONS["last_full"]
    with pytest.raises(ValueError, match=r"the policy is for 1 layers x 2 KV heads, but .* has 2 layers x 2 KV heads"):
        runs.rows(model, [NeverFull(), FixedStride(((2, 3),))], selection, prompt, 2)
    sized = Selection(6, 0, 3, prompt_queries=None, unit_k=((6, 6, 6),))
    with pytest.raises(ValueError, match=r"the selection is for 1 layers x 3 KV heads, but .* has 2 layers x 2 KV"):
        runs.rows(model, [NeverFull()], sized, prompt, 2)
