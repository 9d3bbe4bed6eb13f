"""A layer's walk by itself: attention, sets and measures against the textbook's, whatever the threads' shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import SIGNALS, GroupPooling, Selection
from recycler.decode.cpu.arrays import REFRESH_MASS, REFRESH_OVERLAP, Cache, Products, Rules, Scratch, Units
from recycler.decode.cpu.attention import BLOCK_TOKENS
from recycler.decode.cpu.walk import attend
from recycler.sets.recycled_set import RecycledSet, select
from recycler.sets.scores import token_scores

STORED = ["float32", "float64", "bfloat16"]
ROWS, KV_HEADS, GROUP, HEAD_DIM, ROOM = 3, 2, 2, 16, 4
SCALING = HEAD_DIM**-0.5
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 2e-5}


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def widened(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


class Layer:
    """Units with sets of their first tokens, over random keys and values."""

    def __init__(
        self, seed: int, kind: str, n_prompt: int, n_own: int, shared: bool, selection: Selection, parts: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype = np.float64 if kind == "float64" else np.float32
        self.n_own, self.end, self.selection, self.parts = n_own, n_prompt + n_own, selection, parts

        def cached(n_rows: int, n_tokens: int) -> np.ndarray:
            return stored(2 * rng.standard_normal((n_rows, KV_HEADS, n_tokens, HEAD_DIM)), kind)

        prompt_rows = 1 if shared else ROWS
        prompt, own = (
            [cached(n_rows, n) for _ in range(2)] for n_rows, n in ((prompt_rows, n_prompt), (ROWS, n_own + ROOM))
        )
        self.cache = Cache(*prompt, *own)
        self.keys, self.values = (
            widened(np.concatenate([np.broadcast_to(first, (ROWS, *first.shape[1:])), rest[:, :, :n_own]], axis=2))
            for first, rest in zip(prompt, own, strict=True)
        )
        self.start = rng.integers(0, self.end, ROWS)
        units, k, places = (ROWS, KV_HEADS), selection.k, self.end + ROOM
        n_units = ROWS * KV_HEADS

        def floats(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        # As after the step before this one: the newest token is not in.
        held = np.minimum(self.end - 1 - self.start, k)
        positions = np.where(np.arange(k) < held[:, None], self.start[:, None] + np.arange(k), -1)
        self.units = Units(
            set_key=np.empty((*units, k, HEAD_DIM), prompt[0].dtype),
            set_value=np.empty((*units, k, HEAD_DIM), prompt[0].dtype),
            positions=np.repeat(positions[:, None], KV_HEADS, axis=1),
            scores=rng.random((*units, k)).astype(np.float32),
            sizes=np.full(KV_HEADS, k),
            filled=np.repeat(held[:, None], KV_HEADS, axis=1),
            stale=np.ones(units, dtype=bool),
            by_keys=np.zeros(units, dtype=bool),
            setless=np.zeros(units, dtype=bool),
            full_query=floats(*units, HEAD_DIM),
            last_query=floats(*units, HEAD_DIM),
        )
        nothing = np.empty((0, 0), dtype)
        self.scratch = Scratch(
            normed=nothing,
            projected=nothing,
            query=floats(*units, GROUP, HEAD_DIM),
            unit_query=floats(*units, HEAD_DIM),
            modes=np.zeros((2, *units), np.int8),
            block=floats(parts, GROUP, BLOCK_TOKENS),
            logits=np.full((n_units, GROUP, max(places, k)), np.nan, dtype),
            normaliser=np.full((n_units, GROUP), np.nan, dtype),
            highest=floats(parts, n_units, GROUP),
            total=floats(parts, n_units, GROUP),
            partial=floats(parts, n_units, GROUP, HEAD_DIM),
            token_score=np.full((parts, max(places, k)), np.nan, np.float32),
            pooled=np.full((parts, max(places, k)), np.nan, np.float32),
            found=np.zeros((parts, places), np.int64),
            was_in=np.zeros((parts, places), dtype=bool),
            attended=floats(*units, GROUP, HEAD_DIM),
            gate=nothing,
            up=nothing,
        )
        self.signals = np.full((ROWS, len(SIGNALS), KV_HEADS), np.nan)

    def attend(self, full: np.ndarray, wants_refresh: bool) -> None:
        selection = self.selection
        rules = Rules(
            sinks=selection.sinks,
            window=selection.window,
            pool_backward=selection.pool_backward,
            pool_forward=selection.pool_forward,
            group_mean=selection.group == GroupPooling.MEAN,
            score_kept=-1.0,
            wants_query_similarity=False,
            wants_step_similarity=False,
            wants_layer_similarity=False,
            wants_refresh=wants_refresh,
        )
        how = (self.units, self.signals, rules, self.scratch, self.parts)
        products = Products(SCALING, 0.0, np.empty((0, 0), dtype=self.scratch.query.dtype))
        attend(full, products, self.start, self.cache, np.full(ROWS, self.n_own), *how)

    def attention(self, row: int, head: int) -> torch.Tensor:
        """`(group, tokens)`, in float64, to the whole cache."""
        logits = self.scratch.query[row, head].astype(np.float64) @ self.keys[row, head].T * SCALING
        logits[:, : self.start[row]] = -np.inf
        return torch.from_numpy(logits).softmax(-1)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    sinks, window = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    k = sinks + max(window, 1) + draw(st.integers(0, 12))
    pools = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    return Selection(k, sinks, window, *pools, group=draw(st.sampled_from(list(GroupPooling)[:2])))


WAYS = ("recycled", "full", "by keys", "full for ever")


@pytest.mark.parametrize("kind", STORED)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_prompt=st.integers(0, 90),
    n_own=st.integers(1, 50),
    shared=st.booleans(),
    selection=selections(),
    parts=st.integers(1, 5),
    ways=st.lists(st.sampled_from(WAYS), min_size=ROWS * KV_HEADS, max_size=ROWS * KV_HEADS),
    wants_refresh=st.booleans(),
)
def test_units_attend_to_what_they_should_and_get_the_sets_that_they_should(
    kind: str,
    seed: int,
    n_prompt: int,
    n_own: int,
    shared: bool,
    selection: Selection,
    parts: int,
    ways: list[str],
    wants_refresh: bool,
) -> None:
    layer = Layer(seed, kind, n_prompt, n_own, shared, selection, parts)
    way = np.array(ways).reshape(ROWS, KV_HEADS)
    layer.units.by_keys[...] = way == "by keys"
    layer.units.setless[...] = (way == "full for ever") & (not wants_refresh)
    before = Units(*(array.copy() for array in layer.units))
    layer.attend(way != "recycled", wants_refresh)
    units, end = layer.units, layer.end
    assert not layer.scratch.was_in.any()
    for row, head in np.ndindex(ROWS, KV_HEADS):
        start, filled, of_unit = int(layer.start[row]), units.filled[row, head], way[row, head]
        held = np.where(np.arange(selection.k) < before.filled[row, head], before.positions[row, head], -1)
        old = RecycledSet(torch.from_numpy(held), torch.from_numpy(before.scores[row, head]), selection)
        old.admit(end - 1, start)
        aged = set(old.positions[old.filled].tolist())
        attention, places = layer.attention(row, head), units.positions[row, head, :filled]
        whole = range(start, end)
        read = {"recycled": sorted(aged), "by keys": sorted(places)}.get(of_unit, whole)
        weights = attention[:, list(read)]
        output = (weights / weights.sum(-1, keepdim=True)).numpy() @ layer.values[row, head, list(read)]
        np.testing.assert_allclose(layer.scratch.attended[row, head], output, rtol=0, atol=TOLERANCE[kind])
        np.testing.assert_array_equal(units.last_query[row, head], layer.scratch.unit_query[row, head])

        mass, overlap = (layer.signals[row, which, head] for which in (REFRESH_MASS, REFRESH_OVERLAP))
        if of_unit == "recycled":
            assert set(places.tolist()) == aged
            np.testing.assert_array_equal(units.full_query[row, head], before.full_query[row, head])
            assert np.isnan([mass, overlap]).all()
            continue
        np.testing.assert_array_equal(units.full_query[row, head], layer.scratch.unit_query[row, head])
        if units.setless[row, head]:
            np.testing.assert_array_equal(units.positions[row, head], before.positions[row, head])
            continue
        scores = token_scores(attention, selection)
        assert_chosen(places, scores.numpy(), selection, start, end)
        np.testing.assert_allclose(units.scores[row, head, :filled], scores[places], rtol=2e-5, atol=1e-30)
        # What a unit attends to at this very step is copied meanwhile; the rest at the next.
        assert units.stale[row, head] == (of_unit != "by keys")
        if not wants_refresh:
            assert np.isnan([mass, overlap]).all()
            continue
        assert mass == pytest.approx(float(attention.mean(0)[places].sum()), abs=1e-5)
        assert overlap == len(aged & set(places.tolist())) / filled


def assert_chosen(places: np.ndarray, scores: np.ndarray, selection: Selection, start: int, end: int) -> None:
    """The set that `select` chooses, except that scores that float32 hardly tells apart may change places."""
    expected = select(torch.from_numpy(scores), selection, start, end)
    right = set(expected.positions[expected.filled].tolist())
    assert len(places) == len(set(places.tolist())) == len(right)
    taken, left = set(places.tolist()) - right, right - set(places.tolist())
    for one, other in zip(sorted(scores[list(taken)]), sorted(scores[list(left)]), strict=True):
        assert one == pytest.approx(other, rel=2e-5)
