"""Signals for policies to decide on. Fixtures, because a test module cannot import this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policies import SIGNALS, ModelShape, Schedule, StepPolicy, StepSignals

N_TRACES, LAYERS, KV_HEADS = 2, 2, 3
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _arrays(signals: StepSignals) -> dict[str, Any]:
    return {
        field.name: getattr(signals, field.name)
        for field in dataclasses.fields(signals)
        if field.name not in ("layer", "reasons", "tables")
    }


def _random_signals(seed: int, missing: float = 0.1) -> StepSignals:
    rng = np.random.default_rng(seed)
    shape = (N_TRACES, LAYERS, KV_HEADS)

    def measured(low: float) -> np.ndarray:
        values = rng.uniform(low, 1, shape)
        # Half of them on a grid, so that thresholds are met exactly.
        values = np.where(rng.random(shape) < 0.5, np.round(values * 20) / 20, values)
        return np.where(rng.random(shape) < missing, np.nan, values)

    step = rng.integers(0, 300, shape).astype(np.float64)
    return StepSignals(
        step=step,
        age=1 + np.floor(rng.random(shape) ** 3 * (step + 1)),
        n_full=np.floor(rng.random(shape) ** 3 * (step + 1)),
        query_similarity=measured(-1),
        step_similarity=measured(-1),
        refresh_mass=measured(0),
        refresh_overlap=measured(0),
        layer_similarity=measured(-1),
        # Few tokens, so that those that policies name occur.
        token=np.where(rng.random(shape) < missing, np.nan, rng.integers(0, 12, shape)),
    )


@pytest.fixture(scope="session")
def random_signals() -> Callable[..., StepSignals]:
    """Makes signals of (traces, layers, kv_heads) units from a seed, with a share of NaN among the measured."""
    return _random_signals


@pytest.fixture(scope="session")
def in_layer() -> Callable[[StepSignals, int], StepSignals]:
    """Cuts signals with a layer axis to the `(rows, kv_heads)` of one layer, as the decoder hands them out."""

    def in_layer(signals: StepSignals, layer: int) -> StepSignals:
        return StepSignals(**{name: array[:, layer] for name, array in _arrays(signals).items()}, layer=layer)

    return in_layer


@pytest.fixture(scope="session", params=DEVICES)
def on_torch(request: pytest.FixtureRequest) -> Callable[[StepSignals], StepSignals]:
    """Copies signals to torch float64, once per device that this machine has."""

    def on_torch(signals: StepSignals) -> StepSignals:
        arrays = {name: torch.tensor(array, device=request.param) for name, array in _arrays(signals).items()}
        return dataclasses.replace(signals, **arrays)

    return on_torch


@pytest.fixture(scope="session")
def signals_of() -> Callable[..., StepSignals]:
    """Makes signals of one unit or more from the values that matter to a test; other signals were not measured."""

    def signals_of(layer: int | None = None, reasons: dict[str, Any] | None = None, **values: Any) -> StepSignals:
        default = dict.fromkeys(SIGNALS, np.nan)
        default |= {"step": 0, "age": 1, "n_full": 0} | values
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.float64(value)) for value in default.values()))
        return StepSignals(**dict(zip(default, arrays, strict=True)), layer=layer, reasons=reasons)

    return signals_of


@pytest.fixture(scope="session")
def drive() -> Callable[..., np.ndarray]:
    """Runs a policy through a `Schedule`: bool `(steps, *units)`, True where a unit ran full.

    `similarity` is `(steps, *units)` or None; `zeros`, an array over units, sets the library.
    """

    def drive(policy: StepPolicy, n_steps: int, similarity: Any = None, zeros: Any = None) -> np.ndarray:
        schedule = Schedule(np.zeros(1) if zeros is None else zeros)
        decisions = []
        for step in range(n_steps):
            full = policy.decide(schedule.signals(None if similarity is None else similarity[step]))
            schedule.advance(full)
            decisions.append(full.tolist())
        return np.array(decisions, dtype=bool)

    return drive


@pytest.fixture(scope="session")
def full_steps(drive: Callable[..., np.ndarray]) -> Callable[..., list[int]]:
    """Runs a policy on a single unit: the steps that it ran full."""

    def full_steps(policy: StepPolicy, n_steps: int, similarity: Any = None) -> list[int]:
        return np.flatnonzero(drive(policy, n_steps, similarity).ravel()).tolist()

    return full_steps


@pytest.fixture
def model() -> ModelShape:
    """The model whose units the random signals are."""
    return ModelShape("tiny", layers=LAYERS, kv_heads=KV_HEADS, query_heads=2 * KV_HEADS, head_dim=8)
