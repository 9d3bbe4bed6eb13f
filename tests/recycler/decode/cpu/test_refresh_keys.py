"""The scoring pass by itself: sets and measures against those of textbook attention, whatever the threads' shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import GroupPooling, Selection
from recycler.decode.cpu.arrays import Cache, Rules, Scratch, Signals, Units
from recycler.decode.cpu.attention import BLOCK_TOKENS
from recycler.decode.cpu.walk import refresh_keys
from recycler.sets.recycled_set import RecycledSet, select
from recycler.sets.scores import token_scores

STORED = ["float32", "float64", "bfloat16"]
ROWS, KV_HEADS, GROUP, HEAD_DIM, ROOM = 3, 2, 2, 16, 4
SCALING = HEAD_DIM**-0.5


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def widened(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


class Layer:
    """Units with sets of their first tokens, over random keys; there are no values."""

    def __init__(
        self, seed: int, kind: str, n_prompt: int, n_own: int, shared: bool, selection: Selection, parts: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype = np.float64 if kind == "float64" else np.float32
        self.n_own, self.end, self.selection, self.parts = n_own, n_prompt + n_own, selection, parts
        prompt = stored(2 * rng.standard_normal((1 if shared else ROWS, KV_HEADS, n_prompt, HEAD_DIM)), kind)
        own = stored(2 * rng.standard_normal((ROWS, KV_HEADS, n_own + ROOM, HEAD_DIM)), kind)
        self.cache = Cache(prompt, np.empty((0, 0, 0, 0), prompt.dtype), own, np.empty((0, 0, 0, 0), own.dtype))
        whole = np.concatenate([np.broadcast_to(prompt, (ROWS, *prompt.shape[1:])), own[:, :, :n_own]], axis=2)
        self.keys = widened(whole)
        self.start = rng.integers(0, self.end, ROWS)
        units, k, places = (ROWS, KV_HEADS), selection.k, self.end + ROOM

        def floats(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        # As after the step before this one: the newest token is not in.
        held = np.minimum(self.end - 1 - self.start, k)
        positions = np.where(np.arange(k) < held[:, None], self.start[:, None] + np.arange(k), -1)
        self.units = Units(
            set_key=np.empty((0, 0, 0, 0), prompt.dtype),
            set_value=np.empty((0, 0, 0, 0), prompt.dtype),
            positions=np.repeat(positions[:, None], KV_HEADS, axis=1),
            scores=rng.random((*units, k)).astype(np.float32),
            sizes=np.full(KV_HEADS, k),
            filled=np.repeat(held[:, None], KV_HEADS, axis=1),
            stale=np.zeros(units, dtype=bool),
            fresh=np.zeros(units, dtype=bool),
            pending=np.zeros(units, dtype=np.int64),
            logits=np.full((*units, GROUP, places), np.nan, dtype),
            normaliser=np.full((*units, GROUP), np.nan, dtype),
            full_query=floats(*units, HEAD_DIM),
            last_query=floats(*units, HEAD_DIM),
        )
        n_units = ROWS * KV_HEADS
        nothing = np.empty((0, 0), dtype)
        self.scratch = Scratch(
            normed=nothing,
            projected=nothing,
            query=floats(*units, GROUP, HEAD_DIM),
            unit_query=floats(*units, HEAD_DIM),
            block=floats(parts, GROUP, BLOCK_TOKENS),
            highest=floats(parts, n_units, GROUP),
            total=floats(parts, n_units, GROUP),
            partial=floats(parts, n_units, GROUP, HEAD_DIM),
            set_logits=np.empty((n_units, GROUP, 0), dtype),
            token_score=np.full((parts, places), np.nan, np.float32),
            pooled=np.full((parts, places), np.nan, np.float32),
            found=np.zeros((parts, places), np.int64),
            was_in=np.zeros((parts, places), dtype=bool),
            attended=floats(*units, GROUP, HEAD_DIM),
            gate=nothing,
            up=nothing,
        )
        self.signals = Signals(*np.full((5, *units), np.nan))

    def refresh(self, refreshed: np.ndarray, wants_refresh: bool) -> None:
        selection = self.selection
        rules = Rules(
            selection.sinks,
            selection.window,
            selection.pool_backward,
            selection.pool_forward,
            selection.group == GroupPooling.MEAN,
            False,
            False,
            False,
            False,
            False,
            wants_refresh,
        )
        how = (self.units, self.signals, rules, self.scratch, self.parts)
        refresh_keys(refreshed, SCALING, self.start, self.cache, self.n_own, *how)

    def attention(self, row: int, head: int) -> torch.Tensor:
        """`(group, tokens)`, in float64."""
        logits = self.scratch.query[row, head].astype(np.float64) @ self.keys[row, head].T * SCALING
        logits[:, : self.start[row]] = -np.inf
        return torch.from_numpy(logits).softmax(-1)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    sinks, window = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    k = sinks + max(window, 1) + draw(st.integers(0, 12))
    pools = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    return Selection(k, sinks, window, *pools, group=draw(st.sampled_from(list(GroupPooling)[:2])))


@pytest.mark.parametrize("kind", STORED)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_prompt=st.integers(0, 90),
    n_own=st.integers(1, 50),
    shared=st.booleans(),
    selection=selections(),
    parts=st.integers(1, 5),
    modes=st.lists(st.booleans(), min_size=ROWS * KV_HEADS, max_size=ROWS * KV_HEADS),
    wants_refresh=st.booleans(),
)
def test_units_get_the_sets_of_full_steps_and_the_others_stay_as_they_are(
    kind: str,
    seed: int,
    n_prompt: int,
    n_own: int,
    shared: bool,
    selection: Selection,
    parts: int,
    modes: list[bool],
    wants_refresh: bool,
) -> None:
    layer = Layer(seed, kind, n_prompt, n_own, shared, selection, parts)
    refreshed = np.array(modes).reshape(ROWS, KV_HEADS)
    before = Units(*(array.copy() for array in layer.units))
    layer.refresh(refreshed, wants_refresh)
    units, end = layer.units, layer.end
    np.testing.assert_array_equal(units.fresh, refreshed)
    assert not layer.scratch.was_in.any()
    for row, head in np.ndindex(ROWS, KV_HEADS):
        if not refreshed[row, head]:
            for name, now, then in zip(Units._fields, units, before, strict=True):
                if now.size and name != "sizes":
                    np.testing.assert_array_equal(now[row, head], then[row, head])
            assert np.isnan([signal[row, head] for signal in layer.signals]).all()
            continue
        start, filled = int(layer.start[row]), units.filled[row, head]
        attention = layer.attention(row, head)
        scores = token_scores(attention, selection)
        places = units.positions[row, head, :filled]
        assert_chosen(places, scores.numpy(), selection, start, end)
        np.testing.assert_allclose(units.scores[row, head, :filled], scores[places], rtol=2e-5, atol=1e-30)
        assert (units.stale[row, head], units.pending[row, head]) == (True, 0)
        np.testing.assert_array_equal(units.full_query[row, head], layer.scratch.unit_query[row, head])
        mass, overlap = (signal[row, head] for signal in layer.signals[-2:])
        if not wants_refresh:
            assert np.isnan([mass, overlap]).all()
            continue
        assert mass == pytest.approx(float(attention.mean(0)[places].sum()), abs=1e-5)
        held = before.filled[row, head]
        old = RecycledSet(
            torch.from_numpy(np.where(np.arange(selection.k) < held, before.positions[row, head], -1)),
            torch.from_numpy(before.scores[row, head]),
            selection,
        )
        old.admit(end - 1, start)
        assert overlap == len(set(old.positions.tolist()) & set(places.tolist())) / filled


def assert_chosen(places: np.ndarray, scores: np.ndarray, selection: Selection, start: int, end: int) -> None:
    """The set that `select` chooses, except that scores that float32 hardly tells apart may change places."""
    expected = select(torch.from_numpy(scores), selection, start, end)
    right = set(expected.positions[expected.filled].tolist())
    assert len(places) == len(set(places.tolist())) == len(right)
    taken, left = set(places.tolist()) - right, right - set(places.tolist())
    for one, other in zip(sorted(scores[list(taken)]), sorted(scores[list(left)]), strict=True):
        assert one == pytest.approx(other, rel=2e-5)
