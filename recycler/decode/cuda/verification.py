"""Full attention for several tokens of every row at once: weights and cache are read once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from policies import GroupPooling
from recycler.decode import modes
from recycler.decode.cuda.arrays import Cached, Parts, Queries
from recycler.decode.cuda.dense import LayerMath
from recycler.decode.cuda.state import Sizes
from recycler.decode.cuda.step_graph import StepGraph
from recycler.decode.cuda.unit_kernels import N_PARTS_AT_ONCE, power_of_2
from recycler.decode.cuda.votes import take_in, vote
from recycler.decode.cuda.walk import merge, walk

if TYPE_CHECKING:
    from recycler.decode.cuda.engine import CudaDecoding

# Of queries beyond so many, a program's sums take the registers of eight warps.
_ROWS_OF_FOUR_WARPS = 64


@dataclass(frozen=True)
class Remembered:
    """What the last verification of each row leaves for the round that follows.

    Attributes:
        votes: float32 `(layers, units, places)`: attention of its queries, summed, and pooled over the group.
        queries: float32 `(layers, rows, queries, kv_heads, head_dim)`: means over the group.
    """

    votes: Tensor
    queries: Tensor

    @classmethod
    def of(cls, sizes: Sizes, queries: int, places: int, device: torch.device, before: Remembered | None) -> Remembered:
        """Room for so many queries and places, with what was remembered before in it."""
        votes = torch.zeros((sizes.layers, sizes.units, places), device=device)
        means = torch.zeros((sizes.layers, sizes.rows, queries, sizes.kv_heads, sizes.head_dim), device=device)
        if before is not None:
            votes[..., : before.votes.shape[-1]] = before.votes
            means[:, :, : before.queries.shape[2]] = before.queries
        return cls(votes, means)


class Verification:
    """Reads a number of tokens of each row that takes part; rows that have fewer are filled up.

    Args:
        steps: The decoding whose drafts it verifies.
        queries: Tokens of a row.
        remembered: Gets what the next round begins with.
        graph: Runs `take`; None runs it kernel by kernel.

    Attributes:
        logits: As stored, `(rows * queries, vocabulary)`: those of the last one.
    """

    def __init__(self, steps: CudaDecoding, queries: int, remembered: Remembered, graph: StepGraph | None) -> None:
        self.queries, self.remembered, self.graph = queries, remembered, graph
        self._steps = steps
        sizes, state, device = steps.sizes, steps.state, steps.state.start.device
        n_tokens, members = sizes.rows * queries, sizes.group * queries
        self._math = LayerMath(steps.parts, n_tokens, steps.machine.compiles)
        self._tokens, self._places = (torch.zeros(n_tokens, dtype=torch.int64, device=device) for _ in range(2))
        # Per row: the last place asked about, whether it takes part, and how many of its queries are its own.
        self._asked = torch.zeros((3, sizes.rows), dtype=torch.int32, device=device)
        self._modes = torch.zeros(sizes.units, dtype=torch.int8, device=device)
        self._cached = Cached(state.start, self._asked[0], self._asked[1])

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n_parts = sizes.n_programs + sizes.units
        self._parts = Parts(zeros(n_parts, members), zeros(n_parts, members), zeros(n_parts, members, sizes.head_dim))
        self._normaliser = zeros(sizes.units, members)
        self._attended = zeros(n_tokens, sizes.kv_heads * sizes.group * sizes.head_dim, dtype=steps.parts.dtype)
        self.logits = zeros(n_tokens, steps.parts.head.out_features, dtype=steps.parts.dtype)

        is_exact = steps.parts.dtype == torch.float32
        self._heads = {"KV_HEADS": sizes.kv_heads, "GROUP": sizes.group, "HEAD_DIM": sizes.head_dim, "QUERIES": queries}
        self._walked = {
            **self._heads,
            "UNITS": power_of_2(sizes.units),
            "TILE": steps.machine.tile_tokens(sizes.head_dim, steps.parts.dtype),
        }
        # Tensor cores take 16 rows; float32 is multiplied without them.
        self._rows_of_walk = max(1 if is_exact else 16, power_of_2(members))
        heads = power_of_2(sizes.group)
        self._voting = {"HEADS": heads, "TOKENS": max(-(-(1 if is_exact else 16) // heads), power_of_2(queries))}

    def ask(self, tokens: Tensor, places: Tensor, at: Tensor, held: np.ndarray, n: np.ndarray) -> None:
        """Say what the next one reads.

        Args:
            tokens: As in `Drafting.verify`.
            places: The same.
            at: int64 `(n,)`: where among the tokens of all rows.
            held: int64 `(rows,)`: tokens of each row since the prompt that they follow.
            n: int64 `(rows,)`: how many of them each row has.
        """
        for mine, given in ((self._tokens, tokens), (self._places, places)):
            mine.zero_()
            mine[at] = given
        asked = np.stack([held + self.queries - 1, n > 0, n]).astype(np.int32)
        self._asked.copy_(torch.from_numpy(asked), non_blocking=True)

    def take(self) -> None:
        """All that happens on the GPU: what the graph holds."""
        steps, math = self._steps, self._math
        of_units = self._asked[1].repeat_interleave(steps.sizes.kv_heads, output_size=len(self._modes))
        self._modes.copy_(of_units * modes.FULL)
        x = steps.parts.embedding.weight[self._tokens]
        cosine, sine = steps.parts.rotary(x, self._places[:, None])
        query, key, value = math.enter(x, steps.weights[0], cosine, sine)
        for layer, weights in enumerate(steps.weights):
            self._attend(layer, query, key, value)
            if layer + 1 < len(steps.weights):
                following = steps.weights[layer + 1]
                x, query, key, value = math.cross(x, self._attended, weights, following, cosine, sine)
        self.logits.copy_(math.leave(x, self._attended, weights, steps.last))

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        steps, cached = self._steps, self._cached
        sizes, machine, state = steps.sizes, steps.machine, steps.state
        kernels, filled = steps.kernels[layer], state.filled[layer]
        take_in[(len(self._tokens) * sizes.kv_heads,)](
            query, key, value, cached, kernels.cache, self.remembered.queries[layer], **self._heads, num_warps=1
        )
        members = sizes.group * self.queries
        walk[(sizes.n_programs,)](
            query,
            cached,
            kernels.cache,
            state.sets(layer),
            self._modes,
            # Of no use: it leaves no logits.
            self._normaliser,
            self._parts,
            kernels.scaling,
            sizes.units,
            sizes.n_prompt,
            steps.scratch.places,
            K=sizes.k,
            ROWS=self._rows_of_walk,
            READS_VALUES=True,
            KEEPS_SET_LOGITS=False,
            **self._walked,
            num_warps=machine.walk_warps * (1 if self._rows_of_walk <= _ROWS_OF_FOUR_WARPS else 2),
            num_stages=machine.walk_stages,
        )
        merge[(sizes.units, members)](
            cached,
            filled,
            Queries(state.full_query[layer], state.last_query[layer]),
            self._modes,
            self._parts,
            self._normaliser,
            self._attended,
            sizes.units,
            sizes.n_prompt,
            sizes.n_programs,
            PARTS=N_PARTS_AT_ONCE,
            READS_VALUES=True,
            **self._walked,
            num_warps=4,
        )
        vote[(sizes.n_programs,)](
            query,
            self._asked[2],
            cached,
            kernels.cache,
            filled,
            self._modes,
            self._normaliser,
            self.remembered.votes[layer],
            kernels.scaling,
            sizes.units,
            sizes.n_prompt,
            steps.scratch.places,
            **self._walked,
            **self._voting,
            MEAN=steps.selection.group == GroupPooling.MEAN,
            num_warps=machine.walk_warps,
            num_stages=machine.walk_stages,
        )
