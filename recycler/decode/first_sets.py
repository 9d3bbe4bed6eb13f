"""What a prompt leaves to decoding: a set, a query and a measure for every unit."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies import Selection
from recycler.sets.recycled_set import RecycledSet, select, unit_sizes
from recycler.sets.scores import token_scores


@dataclass(frozen=True)
class LayerFirstSets:
    """What a prompt leaves of one layer.

    Attributes:
        sets: The first sets, `(rows, kv_heads, k)`.
        query: Float `(rows, kv_heads, head_dim)`: mean query of each group at the last token.
        mass: float64 `(rows, kv_heads)`: recovered mass of the sets, in [0, 1].
    """

    sets: RecycledSet
    query: Tensor
    mass: Tensor


@dataclass(frozen=True)
class FirstSets:
    """What a prompt leaves of all layers; the beginning of every decoding, which changes nothing in it.

    Attributes:
        selection: How the sets were chosen.
        positions: int64 `(layers, rows, kv_heads, k)`: places in the cache, in the first slots; -1 in the others.
        scores: float32 of the same shape: what tokens are ranked by.
        sizes: int64 `(layers, kv_heads)`: most tokens of each head's sets.
        query: Float `(layers, rows, kv_heads, head_dim)`: mean query of each group at the last token.
        mass: float64 `(layers, rows, kv_heads)`: recovered mass of the sets, in [0, 1].
        start: int64 `(rows,)`: place of each row's first token, after left padding.
        end: One past the last token.
        row_ends: int64 `(rows,)`: that of each row, where they differ; None where all are `end`.
    """

    selection: Selection
    positions: Tensor
    scores: Tensor
    sizes: Tensor
    query: Tensor
    mass: Tensor
    start: np.ndarray
    end: int
    row_ends: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerFirstSets],
        start: np.ndarray,
        end: int,
        *,
        n_rows: int | None = None,
        row_ends: np.ndarray | None = None,
    ) -> FirstSets:
        """Put layers together.

        Args:
            layers: All layers of a model.
            start: As above.
            end: As above.
            n_rows: How many rows decode: from one prompt, or from several in turn; None for one row from each.
            row_ends: As above.
        """
        selection = layers[0].sets.selection
        rows = len(layers[0].query) if n_rows is None else n_rows

        def stacked(parts: Sequence[Tensor]) -> Tensor:
            whole = torch.stack(list(parts))
            n_prompts = whole.shape[1]
            return whole[:, torch.arange(rows, device=whole.device) % n_prompts] if n_prompts < rows else whole

        positions = stacked([layer.sets.positions for layer in layers])
        # Empty slots may be anywhere in a set that was just chosen; here they come last.
        order = (positions < 0).to(torch.int8).argsort(dim=-1, stable=True)
        of_heads = selection.unit_k or ((selection.k,) * positions.shape[2],) * len(layers)
        return cls(
            selection=selection,
            positions=positions.gather(-1, order),
            scores=stacked([layer.sets.scores for layer in layers]).gather(-1, order),
            sizes=torch.tensor(of_heads, device=positions.device),
            query=stacked([layer.query for layer in layers]),
            mass=stacked([layer.mass for layer in layers]),
            start=np.broadcast_to(start, (rows,)),
            end=end,
            row_ends=row_ends,
        )

    @property
    def units(self) -> tuple[int, int]:
        """`(layers, kv_heads)`."""
        return self.positions.shape[0], self.positions.shape[2]

    @property
    def n_rows(self) -> int:
        """Rows that decode."""
        return int(self.positions.shape[1])

    def measured_mass(self, needs: Set[str]) -> Tensor:
        """`mass` where a policy wants it to be measured, else NaN."""
        return self.mass if "refresh_mass" in needs else torch.full_like(self.mass, float("nan"))


@torch.no_grad()
def first_sets_of_layer(
    layer: int,
    selection: Selection,
    query: Tensor,
    probabilities: Tensor,
    start: Tensor | int,
    end: Tensor | int,
    votes: Tensor | None = None,
) -> LayerFirstSets:
    """Choose the first sets of a layer.

    Args:
        layer: Index of the layer.
        selection: How.
        query: `(rows, kv_heads, group, head_dim)`, the last query of the prompt.
        probabilities: `(rows, kv_heads, group, tokens)`, its attention to the whole cache.
        start: Place of each row's first token, an int or `(rows, 1, 1)`.
        end: One past the last token, likewise.
        votes: Of the shape of `probabilities`: attention that chooses, where several queries of the prompt do
            (`Selection.prompt_queries`); None if the last one does.
    """
    scores = token_scores(probabilities if votes is None else votes, selection)
    sets = select(scores, selection, start, end, unit_sizes(selection, layer, query.device))
    return LayerFirstSets(sets, unit_query(query), sets.recovered_mass(probabilities).double())


def unit_query(query: Tensor) -> Tensor:
    """A unit's query, the mean over its group: `(..., group, head_dim)` to `(..., head_dim)`, at least in float32."""
    return query.mean(-2, dtype=torch.promote_types(query.dtype, torch.float32))
