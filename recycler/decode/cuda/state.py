"""The memory that the kernels of a run share: state of the units, layer by layer, and room for intermediate results."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies import SIGNALS
from recycler.decode.cuda.arrays import Decisions, Parts, Queries, Search, Sets, Weights
from recycler.decode.cuda.score import HIGH_BINS
from recycler.decode.first_sets import FirstSets


@dataclass(frozen=True)
class Sizes:
    """What does not change during a run.

    Attributes:
        rows: Of the batch.
        layers: Of the model.
        kv_heads: Of a layer.
        group: Query heads of a KV head.
        head_dim: Of a head.
        k: Slots of a set.
        n_prompt: Tokens of the prompt.
        n_programs: Programs of a kernel that shares out its work.
        chunk_tokens: Tokens of a chunk in the kernels that choose sets.
    """

    rows: int
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    k: int
    n_prompt: int
    n_programs: int
    chunk_tokens: int

    @property
    def units(self) -> int:
        """Units of a layer."""
        return self.rows * self.kv_heads


class UnitState:
    """The state of all units.

    Args:
        sizes: Of the run.
        first: What the prompt left behind; on the device where all of this lives.
        needs: Measured signals that the policy reads.
        by_keys: bool `(rows, layers, kv_heads)`: units that refresh by their keys alone.
        n_reasons: Reasons that the policy notes.

    Attributes:
        signals, positions, ...: The arrays of `Decisions` and `Sets`, for all layers: `(layers, rows, kv_heads, ...)`,
            after signals or reasons if there are several.
        set_sizes: int32 `(layers, kv_heads)`: most tokens of each head's sets.
        full_query: float32 `(layers, rows, kv_heads, head_dim)`: those of `Queries`.
        last_query: The same.
        start: int32 `(rows,)`: place of each row's first token.
        full_before: float64 `(layers, rows, kv_heads)`: full steps of schedules before this one.
        n_own: int32 `(rows,)`: own tokens in the cache.
        going: int32 `(rows,)`: 1 for rows that take the next step, 0 for others.
        led: int32 `(rows,)`: as in `Decisions`.
        rows: int32 `(rows,)`: all rows.
    """

    def __init__(
        self,
        sizes: Sizes,
        first: FirstSets,
        needs: Set[str],
        by_keys: np.ndarray,
        n_reasons: int,
    ) -> None:
        shape = (sizes.layers, sizes.rows, sizes.kv_heads)
        device = first.positions.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.signals = zeros(len(SIGNALS), *shape, dtype=torch.float64)
        self.full_before = zeros(*shape, dtype=torch.float64)
        self.begin_schedule()
        self.signals[SIGNALS.index("refresh_mass")] = first.measured_mass(needs)
        self.decided, self.given = zeros(*shape, dtype=torch.int8), zeros(*shape, dtype=torch.int8)
        keys_only = np.broadcast_to(by_keys, (sizes.rows, sizes.layers, sizes.kv_heads)).transpose(1, 0, 2)
        # Kernels count units in order of memory, and torch keeps the order that an array has.
        self.by_keys = torch.tensor(np.ascontiguousarray(keys_only, dtype=np.int8), device=device)
        self.overruled = zeros(max(n_reasons, 1), *shape, dtype=torch.int32)
        self.tokens_read = zeros(*shape, dtype=torch.float64)
        self.all_tokens_read = zeros(*shape, dtype=torch.float64)

        # Kernels write to these, and other decodings may begin from the same sets.
        self.positions = first.positions.to(torch.int32)
        self.scores = first.scores.clone()
        self.filled = (first.positions >= 0).sum(-1).to(torch.int32)
        self.set_sizes = first.sizes.to(torch.int32)
        # Rows that share a prompt share its query, where kernels want one for each.
        self.full_query = first.query.to(torch.float32).clone(memory_format=torch.contiguous_format)
        self.last_query = self.full_query.clone()
        self.start = torch.tensor(first.start, dtype=torch.int32, device=device)
        self.n_own = zeros(sizes.rows, dtype=torch.int32)
        self.going, self.led = torch.ones_like(self.n_own), torch.zeros_like(self.n_own)
        self.rows = torch.arange(sizes.rows, dtype=torch.int32, device=device)

    def begin_schedule(self) -> None:
        """Show policies what they see before a first step; sets are not measured."""
        self.full_before += self.signals[SIGNALS.index("n_full")]
        for name in SIGNALS:
            unknown = name.endswith("_similarity") or name in ("refresh_mass", "refresh_overlap", "token")
            self.signals[SIGNALS.index(name)] = float("nan") if unknown else float(name == "age")

    def sets(self, layer: int) -> Sets:
        """The sets of a layer."""
        return Sets(self.positions[layer], self.scores[layer], self.filled[layer])

    def queries(self, layer: int) -> Queries:
        """The queries of a layer."""
        return Queries(self.full_query[layer], self.last_query[layer])

    def decisions(self, layer: int) -> Decisions:
        """What the policy is shown and decides at a layer."""
        return Decisions(
            signals=self.signals[:, layer],
            given=self.given[layer],
            by_keys=self.by_keys[layer],
            led=self.led,
            decided=self.decided[layer],
            overruled=self.overruled[:, layer],
            tokens_read=self.tokens_read[layer],
            all_tokens_read=self.all_tokens_read[layer],
        )


class Scratch:
    """Room for intermediate results, which all layers use one after the other.

    Args:
        sizes: Of the run.
        places: Most tokens that the cache holds before it grows again.
        measures: Whether new sets are compared with those before.
        dtype: Of the model.
        device: Where it lives.

    Attributes:
        places: As above.
        chunks: Chunks of so many places, to the next power of 2.
        modes_before: int8 `(units,)`: modes of the walk of keys-only refreshes.
        modes: int8 `(units,)`: modes of the attention.
        weights: Of the last walk.
        parts: The same.
        search: For new sets.
        attended: As stored, `(rows, query_heads * head_dim)`: the attention.
    """

    def __init__(self, sizes: Sizes, places: int, measures: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.places = places
        self.chunks = 1 << (-(-places // sizes.chunk_tokens) - 1).bit_length()
        units, group, parts = sizes.units, sizes.group, sizes.n_programs + sizes.units

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.modes_before, self.modes = zeros(units, dtype=torch.int8), zeros(units, dtype=torch.int8)
        self.weights = Weights(logits=zeros(units, group, places), normaliser=zeros(units, group))
        self.parts = Parts(zeros(parts, group), zeros(parts, group), zeros(parts, group, sizes.head_dim))
        self.search = Search(
            scores=zeros(units, places),
            counts=zeros(units, HIGH_BINS.value, dtype=torch.int32),
            picked=zeros(units, self.chunks * sizes.chunk_tokens, dtype=torch.int32),
            n_picked=zeros(units, 2, self.chunks, dtype=torch.int32),
            marks=zeros(units, places if measures else 1, dtype=torch.int32),
        )
        self.attended = zeros(sizes.rows, sizes.kv_heads * group * sizes.head_dim, dtype=dtype)
