from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policies import MEASURED_SIGNALS, StepSignals

SignalsOf = Callable[..., StepSignals]

TABLE = ((1.0, 2.0, 3.0), (4.0, 5.0, 1 / 3))


def test_every_measured_signal_is_a_field() -> None:
    assert {field.name for field in dataclasses.fields(StepSignals)} >= MEASURED_SIGNALS


def test_a_number_stays_a_number(signals_of: SignalsOf) -> None:
    assert signals_of().per_unit(10) == 10
    assert isinstance(signals_of().per_unit(2.5), float)


def test_a_table_is_cut_to_the_layer_at_hand(signals_of: SignalsOf) -> None:
    np.testing.assert_array_equal(signals_of(age=np.ones((2, 2, 3))).per_unit(TABLE), TABLE)
    np.testing.assert_array_equal(signals_of(age=np.ones((2, 3)), layer=1).per_unit(TABLE), TABLE[1])


def test_a_table_takes_library_and_dtype_of_the_signals(signals_of: SignalsOf) -> None:
    assert signals_of(age=np.ones((1, 2, 3))).per_unit(TABLE).dtype == np.float64
    on_torch = dataclasses.replace(signals_of(), age=torch.ones((1, 2, 3), dtype=torch.float64))
    table = on_torch.per_unit(TABLE)
    assert table.dtype == torch.float64
    # To the last bit: 1/3 does not pass through float32.
    assert table.tolist() == [list(row) for row in TABLE]


@pytest.mark.parametrize("values", [np.array, torch.tensor])
def test_reasons_add_up_over_wrappers(signals_of: SignalsOf, values: Callable[[Any], Any]) -> None:
    reasons: dict[str, Any] = {}
    signals = signals_of(age=[1, 1, 1], reasons=reasons)
    signals.because("budget", values([True, False, False]))
    signals.because("max_age", values([False, False, True]))
    signals.because("budget", values([False, True, False]))
    assert {reason: units.tolist() for reason, units in reasons.items()} == {
        "budget": [True, True, False],
        "max_age": [False, False, True],
    }


def test_reasons_that_nobody_asks_for_are_dropped(signals_of: SignalsOf) -> None:
    signals_of().because("budget", np.array([True]))
    assert signals_of().reasons is None
