"""Attention of full and recycled units together, against exact attention in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from recycler.decode.cuda.arrays import Cache, Cached, Parts, Queries, Sets
from recycler.decode.cuda.walk import merge, walk
from recycler.decode.modes import FULL, KEYS_ONLY, RECYCLED, SKIP


@dataclass(frozen=True)
class Case:
    """A layer's units at a step.

    Attributes:
        query: As stored, `(rows, kv_heads, group, head_dim)`.
        key: As stored, `(rows, kv_heads, tokens, head_dim)`.
        value: The same.
        n_prompt: How many of the tokens are the prompt's.
        starts: Place of each row's first token.
        modes: Of the units.
        sets: int32 `(units, k)`, places, of which `filled` count.
        filled: int32 `(units,)`.
        shared: Whether rows share one prompt; then keys and values of row 0 count there.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    n_prompt: int
    starts: tuple[int, ...]
    modes: tuple[int, ...]
    sets: Tensor
    filled: Tensor
    shared: bool = False


@dataclass(frozen=True)
class Walked:
    attended: Tensor
    normaliser: Tensor
    logits: Tensor
    full_query: Tensor


def run(case: Case, device: torch.device, *, n_programs: int = 3, tile: int = 16, values: bool = True) -> Walked:
    rows, kv_heads, group, head_dim = case.query.shape
    units, n, k = rows * kv_heads, case.key.shape[2], case.sets.shape[1]
    room, places = n - case.n_prompt + 2, n + 3
    keys_and_values = [part.to(device) for part in (case.key, case.value)]
    prompt = [part[: 1 if case.shared else rows, :, : case.n_prompt].contiguous() for part in keys_and_values]
    own = [
        torch.full((rows, kv_heads, room, head_dim), float("nan"), dtype=part.dtype, device=device)
        for part in keys_and_values
    ]
    for part, new in zip(keys_and_values, own, strict=True):
        new[:, :, : n - case.n_prompt] = part[:, :, case.n_prompt :]

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), device=device)

    unit_modes = torch.tensor(case.modes, dtype=torch.int8, device=device)
    cached = Cached(
        start=torch.tensor(case.starts, dtype=torch.int32, device=device),
        n_own=torch.full((rows,), n - case.n_prompt - 1, dtype=torch.int32, device=device),
        going=torch.ones(rows, dtype=torch.int32, device=device),
    )
    cache = Cache(
        *prompt,
        prompt_row=0 if case.shared else prompt[0].stride(0),
        own=torch.tensor([part.data_ptr() for part in own], device=device),
        room=torch.tensor([room], dtype=torch.int32, device=device),
    )
    query, positions, filled = (x.to(device).contiguous() for x in (case.query, case.sets, case.filled))
    sets = Sets(positions, scores=empty(units, k), filled=filled)
    queries = Queries(
        full=torch.zeros((units, head_dim), device=device),
        last=torch.ones((units, head_dim), device=device),
    )
    logits, normaliser = empty(units, group, places), empty(units, group)
    n_parts = n_programs + units
    parts = Parts(empty(n_parts, group), empty(n_parts, group), empty(n_parts, group, head_dim))
    attended = torch.zeros((units, group, head_dim), dtype=case.query.dtype, device=device)
    how = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "QUERIES": 1,
        "UNITS": 1 << (units - 1).bit_length(),
        "TILE": tile,
        "READS_VALUES": values,
    }
    walk[(n_programs,)](
        query, cached, cache, sets, unit_modes, logits, parts, head_dim**-0.5, units, case.n_prompt, places,
        K=k, ROWS=16, KEEPS_SET_LOGITS=False, **how,
    )  # fmt: skip
    merge[(units, group)](
        cached,
        filled,
        queries,
        unit_modes,
        parts,
        normaliser,
        attended,
        units,
        case.n_prompt,
        n_programs,
        PARTS=4,
        **how,
    )
    return Walked(*(x.cpu() for x in (attended, normaliser, logits, queries.full)))


def exact(case: Case, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, log-normaliser and logits `(group, seen)` of a unit, in float64."""
    kv_heads = case.query.shape[1]
    row, head = unit // kv_heads, unit % kv_heads
    key, value = (part[row, head].double().clone() for part in (case.key, case.value))
    if case.shared:
        for mine, part in ((key, case.key), (value, case.value)):
            mine[: case.n_prompt] = part[0, head, : case.n_prompt].double()
    places = torch.arange(case.starts[row], len(key))
    if case.modes[unit] == RECYCLED:
        places = case.sets[unit, : case.filled[unit]].long()
    logits = case.query[row, head].double() @ key[places].T * key.shape[-1] ** -0.5
    return logits.softmax(-1) @ value[places], logits.logsumexp(-1), logits


def make(
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    n: int = 45,
    n_prompt: int = 37,
    starts: tuple[int, ...] = (0, 6),
    unit_modes: tuple[int, ...] = (FULL, RECYCLED, RECYCLED, FULL),
    k: int = 21,
    shared: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(n + 7 * group)
    shape = (rows, kv_heads, n, head_dim)
    query = torch.randn((rows, kv_heads, group, head_dim), generator=generator) * 2
    key, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    units = rows * kv_heads
    sets = torch.stack([torch.randperm(n - max(starts), generator=generator)[:k] + max(starts) for _ in range(units)])
    filled = torch.tensor([k - unit % 3 for unit in range(units)], dtype=torch.int32)
    parts = (part.to(dtype) for part in (query, key, value))
    return Case(*parts, n_prompt, starts, unit_modes, sets.to(torch.int32), filled, shared)


def assert_exact(case: Case, walked: Walked, tolerance: float) -> None:
    """Relative to the largest number of a unit."""
    for unit, mode in enumerate(case.modes):
        if mode == SKIP:
            continue
        attention, normaliser, logits = exact(case, unit)
        if mode in (FULL, RECYCLED):
            error = (walked.attended[unit].double() - attention).abs().max() / attention.abs().max()
            assert error <= tolerance, (unit, error)
        torch.testing.assert_close(walked.normaliser[unit].double(), normaliser, rtol=tolerance, atol=tolerance)
        if mode != RECYCLED:
            start = case.starts[unit // case.query.shape[1]]
            kept = walked.logits[unit, :, start : case.key.shape[2]].double()
            torch.testing.assert_close(kept, logits, rtol=tolerance, atol=tolerance * logits.abs().max().item())
        # The query of the last full step is brought up to date for those that scored the cache, and for no others.
        assert walked.full_query[unit].unique().tolist() == [float(mode != RECYCLED)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_is_exact_for_heads_and_groups_of_all_sizes(
    device: torch.device, dtype: torch.dtype, tolerance: float, head_dim: int, group: int
) -> None:
    case = make(dtype, head_dim=head_dim, group=group)
    assert_exact(case, run(case, device), tolerance)


@pytest.mark.parametrize("n_programs", [1, 2, 4, 7, 30])
def test_how_the_work_is_cut_changes_nothing_but_rounding(device: torch.device, n_programs: int) -> None:
    case = make(n=83, n_prompt=70)
    assert_exact(case, run(case, device, n_programs=n_programs), 1e-5)


@pytest.mark.parametrize(
    ("n", "n_prompt", "starts"), [(16, 15, (0, 0)), (17, 1, (0, 16)), (33, 32, (1, 31)), (40, 16, (15, 17))]
)
def test_lengths_that_are_no_multiples_of_a_tile(
    device: torch.device, n: int, n_prompt: int, starts: tuple[int, int]
) -> None:
    case = make(n=n, n_prompt=n_prompt, starts=starts, k=1)
    case = Case(**(vars(case) | {"filled": torch.ones(4, dtype=torch.int32)}))
    assert_exact(case, run(case, device), 1e-5)


@pytest.mark.parametrize("filled", [1, 5, 21])
def test_sets_that_are_nearly_empty_and_full(device: torch.device, filled: int) -> None:
    case = make(unit_modes=(RECYCLED,) * 4)
    case = Case(**(vars(case) | {"filled": torch.full((4,), filled, dtype=torch.int32)}))
    assert_exact(case, run(case, device), 1e-5)


def test_rows_may_share_a_prompt(device: torch.device) -> None:
    case = make(starts=(0, 0), shared=True)
    assert_exact(case, run(case, device), 1e-5)


def test_units_that_refresh_by_keys_read_no_values(device: torch.device) -> None:
    case = make(unit_modes=(SKIP, KEYS_ONLY, SKIP, KEYS_ONLY))
    # What they would read is not there.
    case = Case(**(vars(case) | {"value": torch.full_like(case.value, float("nan"))}))
    walked = run(case, device, values=False)
    assert_exact(case, walked, 1e-5)
    assert not walked.attended.any()


def test_a_layer_in_which_nothing_is_to_be_done_does_nothing(device: torch.device) -> None:
    walked = run(make(unit_modes=(SKIP,) * 4), device)
    assert not walked.attended.any()
    assert walked.logits.isnan().all()
    assert walked.normaliser.isnan().all()
