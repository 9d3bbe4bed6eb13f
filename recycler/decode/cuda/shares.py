"""Equal shares for all programs of a kernel, whatever mixture of full and recycled units a layer has.

Kernels run a fixed number of programs, as many as the GPU holds at once. What there is to do is laid end to end, unit
after unit, and found by a sum over the units' flags in device memory: no program starts for work that a unit does not
have, and none waits for a unit with more of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recycler.decode import modes

# As kernels take numbers of ours.
SKIP, RECYCLED, FULL, KEYS_ONLY = (
    tl.constexpr(mode) for mode in (modes.SKIP, modes.RECYCLED, modes.FULL, modes.KEYS_ONLY)
)


@triton.jit
def tiles_of_units(
    modes, filled, cached, n_units, n_prompt, KV_HEADS: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr
):
    """Tiles of tokens that each unit walks over, int32 `(UNITS,)`.

    Args:
        modes: int8 `(units,)`.
        filled: Of `Sets`.
        TILE: Tokens of a tile.
    """
    unit = tl.arange(0, UNITS)
    exists = unit < n_units
    mode = tl.load(modes + unit, mask=exists, other=0)
    row = unit // KV_HEADS
    end = n_prompt + tl.load(cached.n_own + row, mask=exists, other=0) + 1
    n_cached = end - tl.load(cached.start + row, mask=exists, other=0)
    n_in_set = tl.load(filled + unit, mask=exists, other=0)
    n_tokens = tl.where(mode == RECYCLED, n_in_set, n_cached)
    return tl.where(mode == SKIP, 0, tl.cdiv(n_tokens, TILE))


@triton.jit
def first_tile(program, n_tiles, n_programs):
    """First tile of a program's share; its last is the next one's first. For `n_programs <= n_tiles`."""
    return (program.to(tl.int64) * n_tiles // n_programs).to(tl.int32)


@triton.jit
def share_of_program(tiles):
    """First tile of this program's share of all units' tiles, and one past its last; equal if it has none."""
    n_tiles = tl.sum(tiles)
    n_programs = tl.minimum(tl.num_programs(0), n_tiles)
    program = tl.program_id(0)
    tile, last = 0, 0
    if program < n_programs:
        tile = first_tile(program, n_tiles, n_programs)
        last = first_tile(program + 1, n_tiles, n_programs)
    return tile, last


@triton.jit
def program_of(tile, n_tiles, n_programs):
    """The program whose share a tile is in."""
    return (((tile + 1).to(tl.int64) * n_programs - 1) // n_tiles).to(tl.int32)


@triton.jit
def furthest(cached, n_units, n_prompt, KV_HEADS: tl.constexpr, UNITS: tl.constexpr):
    """One past the last token of the row that has most."""
    unit = tl.arange(0, UNITS)
    return n_prompt + tl.max(tl.load(cached.n_own + unit // KV_HEADS, mask=unit < n_units, other=0)) + 1


@triton.jit
def units_in(modes, mode, n_units, UNITS: tl.constexpr):
    """How many units up to each one are in a mode, int32 `(UNITS,)`; the last number is that of all."""
    unit = tl.arange(0, UNITS)
    return tl.cumsum((tl.load(modes + unit, mask=unit < n_units, other=0) == mode).to(tl.int32))
