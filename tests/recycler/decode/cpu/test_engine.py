"""What is the CPU engine's own: threads, compact copies, and the plain path's decoding whatever is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies import (
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler.decode.cpu.decide import run_program
from recycler.decode.cpu.dense import feed, predict, project
from recycler.decode.cpu.walk import attend

Make = Callable[..., Any]

N_PROMPT = 20
SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
UPDATED = Selection(9, sinks=1, window=3, group="mean", ranking="updated")
SIZED = Selection(12, 2, 4, 1, 2, unit_k=((6, 18), (14, 10)))
BUDGET = BudgetConstrained(CosineThreshold(0.9), 0.3, 1)
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)
KEYS_ONLY = RefreshKeys(LOGISTIC)
COUNTED = ("full_steps", "keys_only_steps", "tokens_read", "tokens_dense")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
@pytest.mark.parametrize("policy", [LOGISTIC, KEYS_ONLY], ids=lambda policy: policy.kind)
@pytest.mark.parametrize("selection", [SELECTION, UPDATED], ids=["last_full", "updated"])
def test_threads_change_nothing_but_rounding(
    runs_on: Make, make_tokens: Make, selection: Selection, policy: StepPolicy
) -> None:
    runs = runs_on("cpu")
    asked = (runs.model(kv_heads=1), policy, selection, make_tokens(45 + 24, rows=3), 45)
    alone = runs.follow(*asked)
    with threads(2):
        together = runs.follow(*asked)
        assert numba.get_num_threads() == 2
    for name in COUNTED:
        np.testing.assert_array_equal(getattr(together.receipt, name), getattr(alone.receipt, name), err_msg=name)
    torch.testing.assert_close(together.logits, alone.logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("selection", [SELECTION, UPDATED, SIZED], ids=["last_full", "updated", "sizes"])
@pytest.mark.parametrize("policy", [BUDGET, KEYS_ONLY], ids=lambda policy: policy.kind)
def test_sets_hold_what_they_must_and_copies_are_of_their_tokens(
    runs_on: Make, make_tokens: Make, policy: StepPolicy, selection: Selection
) -> None:
    runs, checked = runs_on("cpu"), []

    def check(session: Any, cache: Any) -> None:
        end = cache.get_seq_length()
        if end == N_PROMPT:
            return
        decoding = session._run.decoding
        for layer, units in enumerate(decoding.units):
            keys = cache.layers[layer].keys.numpy()
            for row, head in np.ndindex(units.filled.shape):
                start, n = runs.padding[row], units.filled[row, head]
                places = set(units.positions[row, head, :n].tolist())
                size = selection.k if selection.unit_k is None else selection.unit_k[layer][head]
                assert len(places) == n == min(size, end - start)
                assert places >= set(range(start, start + selection.sinks))
                assert places >= set(range(max(start, end - selection.window), end))
                if decoding.full[row, layer, head] and not decoding.keys_only[row, layer, head]:
                    # Nobody has read the new set yet.
                    continue
                copied = keys[row, head, units.positions[row, head, :n]]
                np.testing.assert_array_equal(units.set_key[row, head, :n], copied)
                read = (end - start + n) / 2 if decoding.keys_only[row, layer, head] else n
                assert decoding.tokens_read[row, layer, head] == read
                checked.append(n)

    tokens = make_tokens(N_PROMPT + 30, rows=3)
    runs.follow(runs.model(), policy, selection, tokens, N_PROMPT, after_step=check)
    assert len(checked) > 100


of_units = st.tuples(*[st.tuples(*[st.integers(0, 1)] * 2)] * 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    by_keys=of_units,
    strides=st.tuples(*[st.tuples(*[st.floats(1, 5)] * 2)] * 2),
    k=st.integers(4, 40),
    ranking=st.sampled_from(["last_full", "updated", "accumulated"]),
    group=st.sampled_from(["max", "mean"]),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_it_decodes_as_the_plain_path_whatever_is_asked(
    runs_on: Make,
    make_tokens: Make,
    by_keys: Any,
    strides: Any,
    k: int,
    ranking: str,
    group: str,
    kv_heads: int,
    seed: int,
) -> None:
    # Tables of other shapes repeat that of two heads.
    modes, clocks = (np.tile(table, 2)[:, :kv_heads].tolist() for table in (by_keys, strides))
    selection = Selection(k, 1, 2, 1, 2, group=group, ranking=ranking)  # type: ignore[arg-type]
    runs = runs_on("cpu")
    tokens = make_tokens(N_PROMPT + 14, rows=3, seed=seed)
    asked = (runs.model(kv_heads=kv_heads), RefreshKeys(FixedStride(clocks), modes), selection, tokens, N_PROMPT)
    found, plain = (one.follow(*asked) for one in (runs, runs.plainly()))
    torch.testing.assert_close(found.logits, plain.logits, rtol=0, atol=1e-10)
    for name in COUNTED:
        np.testing.assert_array_equal(getattr(found.receipt, name), getattr(plain.receipt, name), err_msg=name)


def dtypes(signature: Any) -> tuple[str, ...]:
    """Of all arrays in it, whatever their order in memory."""
    fields = [field for argument in signature for field in getattr(argument, "types", (argument,))]
    return tuple(str(field.dtype) for field in fields if isinstance(field, numba.types.Array))


def test_a_kernel_is_compiled_once_for_a_model_s_type_however_it_is_run(runs_on: Make, make_tokens: Make) -> None:
    # For arrays in another order all of a kernel would be compiled again.
    runs = runs_on("cpu")
    model, text = runs.model(), make_tokens(N_PROMPT + 3)[0]
    for rows in (1, 3):
        runs.follow(model, KEYS_ONLY, UPDATED, make_tokens(N_PROMPT + 3, rows), N_PROMPT)
    # Rows that share a prompt, with policies of their own.
    runs.follow_rows(model, [LOGISTIC, FixedStride(3)], SIZED, text, N_PROMPT)
    for kernel in (project, run_program, attend, feed, predict):
        compiled = [dtypes(signature) for signature in kernel.signatures]
        assert len(compiled) == len(set(compiled)) > 0, kernel
