"""The radix select against `recycler.sets.recycled_set.select`, on scores with many ties and sets of all sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies import Selection
from recycler.decode import modes
from recycler.decode.cuda.arrays import Cached, Search, Sets, Weights
from recycler.decode.cuda.choose import finish, pick
from recycler.decode.cuda.score import score
from recycler.sets.recycled_set import select
from recycler.sets.scores import token_scores

CHUNK = 16
# Scores go down to 1e-30: an exponential with the exponent rounded to float32 is off by 7e-6, a GPU's own by 4e-6 more.
RTOL = 3e-5 if torch.cuda.is_available() else 1e-5


@dataclass(frozen=True)
class Case:
    """Units of one row per start; `fresh` are those that choose."""

    logits: Tensor  # (rows, kv_heads, group, tokens)
    starts: tuple[int, ...]
    selection: Selection
    sizes: tuple[int, ...]
    fresh: tuple[bool, ...]


@dataclass(frozen=True)
class Chosen:
    """`(units, ...)`, on the host."""

    positions: np.ndarray
    scores: np.ndarray
    filled: np.ndarray
    mass: np.ndarray
    overlap: np.ndarray
    counts: np.ndarray


def choose(case: Case, device: torch.device, n_programs: int = 3, before: Tensor | None = None) -> Chosen:
    rows, kv_heads, group, n = case.logits.shape
    units, places = rows * kv_heads, n + 5
    chunks = 1 << (-(-places // CHUNK) - 1).bit_length()
    k = max(case.sizes)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    logits = torch.full((units, group, places), float("nan"), device=device)
    logits[:, :, :n] = case.logits.flatten(0, 1).to(device)
    normaliser = normalisers(case).to(device)
    unit_modes = zeros(units, dtype=torch.int8)
    unit_modes[:] = torch.tensor([modes.FULL if fresh else modes.RECYCLED for fresh in case.fresh])
    # Of the cache's tokens all but the last are the prompt's.
    start, sizes = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.starts, case.sizes))
    cached, n_prompt = Cached(start, torch.zeros_like(start), torch.ones_like(start)), n - 1
    sets = Sets(
        positions=zeros(units, k) if before is None else before.to(device).clone(),
        scores=zeros(units, k, dtype=torch.float32),
        filled=torch.full((units,), k, dtype=torch.int32, device=device),
    )
    weights = Weights(logits, normaliser)
    search = Search(
        scores=zeros(units, places, dtype=torch.float32),
        counts=zeros(units, 2048),
        picked=zeros(units, chunks * CHUNK),
        n_picked=zeros(units, 2, chunks),
        marks=zeros(units, places),
    )
    # What was not written there would win.
    unpooled = torch.full((units, places), 1e30, device=device)
    mass, overlap = zeros(units, dtype=torch.float64), zeros(units, dtype=torch.float64)
    selection = case.selection
    how = {"CHUNK": CHUNK, "SINKS": selection.sinks, "WINDOW": selection.window}
    mode, units_to = modes.FULL, 1 << (units - 1).bit_length()
    score[(n_programs,)](
        unit_modes, mode, cached, weights, search.scores, unpooled, search.counts, units, n_prompt, places,
        KV_HEADS=kv_heads, GROUP=group, UNITS=units_to, BACKWARD=selection.pool_backward,
        FORWARD=selection.pool_forward, EDGE=8, MEAN=selection.group == "mean", VOTED=False, **how,
    )  # fmt: skip
    pick[(n_programs,)](
        unit_modes, mode, cached, sizes, search, units, n_prompt, places,
        KV_HEADS=kv_heads, UNITS=units_to, CHUNKS=chunks, **how,
    )  # fmt: skip
    finish[(units,)](
        unit_modes, mode, cached, sets, sizes, weights, search, mass, overlap, 0, 1, n_prompt, places,
        K=k, KV_HEADS=kv_heads, GROUP=group, CHUNKS=chunks, MEASURES=True, **how,
    )  # fmt: skip
    return Chosen(*(x.cpu().numpy() for x in (sets.positions, sets.scores, sets.filled, mass, overlap, search.counts)))


def normalisers(case: Case) -> Tensor:
    """What a walk leaves, and scores are made of: float32 `(units, group)`, logs of sums of exponentials."""
    seen = torch.arange(case.logits.shape[-1]) >= torch.tensor(case.starts)[:, None]
    return case.logits.masked_fill(~seen[:, None, None], float("-inf")).logsumexp(-1).flatten(0, 1)


def assert_as_reference(case: Case, chosen: Chosen) -> None:
    """Same places, same scores; mass and overlap with an old set of place 0, k times."""
    rows, kv_heads, group, n = case.logits.shape
    for unit in range(rows * kv_heads):
        if not case.fresh[unit]:
            assert chosen.positions[unit].max() == 0
            continue
        start, size = case.starts[unit // kv_heads], case.sizes[unit % kv_heads]
        logits = case.logits.flatten(0, 1)[unit].clone()
        logits[:, :start] = float("-inf")
        # Out of the normaliser that kernels get: a float32 near 64 tells no weights apart that differ by 4e-6.
        weights = (logits - normalisers(case)[unit][:, None]).clamp(max=0).exp()
        scores = token_scores(weights, case.selection)
        expected = select(scores[None], replace(case.selection, k=size), start, n)
        places = sorted(expected.positions[expected.filled].tolist())
        found = chosen.positions[unit, : chosen.filled[unit]].tolist()
        assert sorted(found) == places
        np.testing.assert_allclose(chosen.scores[unit, : chosen.filled[unit]], scores[found], rtol=RTOL, atol=1e-30)
        assert chosen.mass[unit] == pytest.approx(weights[:, places].sum().item() / group, rel=RTOL)
        assert chosen.overlap[unit] == (0 in places) / len(places)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, kv_heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    group, n = draw(st.sampled_from([1, 2, 3])), draw(st.integers(2, 70))
    sinks, window = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    least = sinks + max(window, 1)
    sizes = tuple(draw(st.integers(least, 40)) for _ in range(kv_heads))
    selection = Selection(
        max(sizes),
        sinks,
        window,
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(["max", "mean"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn((rows, kv_heads, group, n), generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    # Few different values make ties.
    logits = logits.round(decimals=draw(st.sampled_from([0, 6])))
    starts = tuple(draw(st.integers(0, n - 1)) for _ in range(rows))
    fresh = tuple(draw(st.booleans()) for _ in range(rows * kv_heads))
    return Case(logits, starts, selection, sizes, fresh)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_sets_are_those_of_the_plain_path(device: torch.device, case: Case) -> None:
    assert_as_reference(case, choose(case, device))


def test_of_two_weights_that_their_normalisers_do_not_tell_apart_the_later_token_is_taken(device: torch.device) -> None:
    logits = torch.full((1, 1, 2, 20), -60.0)
    # 1 - e^-13 and 1 - e^-19, both 1 out of a float32 normaliser.
    logits[0, 0, 0, [11, 1]], logits[0, 0, 1, [1, 15]] = torch.tensor([64.0, 51.0]), torch.tensor([65.0, 46.0])
    case = Case(logits, (0,), Selection(1, 0, 0, 0, 0), (1,), (True,))
    chosen = choose(case, device)
    assert chosen.positions[0].tolist() == [11]
    assert_as_reference(case, chosen)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_long_caches_of_equal_and_of_different_scores(device: torch.device, scale: float) -> None:
    logits = torch.randn((1, 1, 1, 2500), generator=torch.Generator().manual_seed(3)) * scale
    case = Case(logits, (7,), Selection(1100, 4, 32), (1100,), (True,))
    assert_as_reference(case, choose(case, device))


def test_counts_are_left_empty_for_the_next_layer(device: torch.device) -> None:
    case = Case(torch.randn(1, 2, 2, 50), (0,), Selection(10, 1, 2), (10, 10), (True, False))
    assert not choose(case, device).counts.any()


def test_how_many_programs_share_the_work_changes_nothing(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    case = Case(torch.randn((2, 2, 2, 60), generator=generator), (0, 9), Selection(20, 1, 2), (20, 12), (True,) * 4)
    one, many = choose(case, device, 1), choose(case, device, 40)
    np.testing.assert_array_equal(one.positions, many.positions)
    np.testing.assert_array_equal(one.scores, many.scores)
