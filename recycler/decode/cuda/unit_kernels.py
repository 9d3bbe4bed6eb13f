"""The kernels of one layer's units, with the memory that they work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policies import SIGNALS, GroupPooling, Selection
from recycler.decode import modes
from recycler.decode.cuda.arrays import Cache, Cached
from recycler.decode.cuda.choose import finish, pick
from recycler.decode.cuda.decisions import RowPrograms
from recycler.decode.cuda.machine import Machine
from recycler.decode.cuda.own_tokens import OwnTokens
from recycler.decode.cuda.prepare import compare, prepare
from recycler.decode.cuda.score import rank_anew, score
from recycler.decode.cuda.state import Scratch, Sizes, UnitState
from recycler.decode.cuda.walk import merge, walk

N_PARTS_AT_ONCE = 32
_MASS, _OVERLAP = SIGNALS.index("refresh_mass"), SIGNALS.index("refresh_overlap")


class UnitKernels:
    """Launches what a layer's units do at a step.

    Args:
        layer: Index of the layer.
        sizes: Of the run.
        state: Of all units.
        scratch: Shared by all layers.
        prompt: The layer's keys and values of the prompt.
        own: Where those since are.
        selection: How sets are chosen.
        needs: Measured signals that the policy reads.
        scaling: Factor on query x key.
        machine: How kernels are launched.
        by_keys: Whether any unit of the layer refreshes by its keys alone.
        chooses: Whether new sets are wanted of units that run full.
    """

    def __init__(
        self,
        layer: int,
        sizes: Sizes,
        state: UnitState,
        scratch: Scratch,
        prompt: tuple[Tensor, ...],
        own: OwnTokens,
        selection: Selection,
        needs: frozenset[str],
        scaling: float,
        machine: Machine,
        by_keys: bool,
        chooses: bool,
    ) -> None:
        self._layer, self._sizes, self._state, self._scratch = layer, sizes, state, scratch
        self.scaling = scaling
        self._selection, self._machine, self._by_keys, self._chooses = selection, machine, by_keys, chooses
        self._measures = bool(needs & {"refresh_mass", "refresh_overlap"})
        self._units_to = power_of_2(sizes.units)
        key, value = prompt
        self._tile = machine.tile_tokens(sizes.head_dim, key.dtype)
        self.cache = Cache(
            prompt_key=key,
            prompt_value=value,
            prompt_row=0 if key.shape[0] < sizes.rows else key.stride(0),
            own=own.addresses[layer],
            room=own.room,
        )
        self._cached = Cached(state.start, state.n_own, state.going)
        self._sets, self._queries, self._decisions = state.sets(layer), state.queries(layer), state.decisions(layer)
        self._set_sizes = state.set_sizes[layer]
        self._refresh = (state.signals[_MASS, layer], state.signals[_OVERLAP, layer])
        self._n_all_units = sizes.layers * sizes.units
        self._wants = {
            "WANTS_QUERY": "query_similarity" in needs,
            "WANTS_LAST": "step_similarity" in needs,
            "WANTS_LAYER": "layer_similarity" in needs,
        }
        self._heads = {"KV_HEADS": sizes.kv_heads, "GROUP": sizes.group}
        self._stays = {"SINKS": selection.sinks, "WINDOW": selection.window}

    def compare(self, query: Tensor) -> None:
        """Measure similarities for a policy that is asked next."""
        compare[(self._sizes.units,)](
            self._state.rows,
            query,
            self._queries,
            self._decisions.signals,
            self._n_all_units,
            **self._wants,
            **self._heads,
            HEAD_DIM=self._sizes.head_dim,
            num_warps=1,
        )

    def prepare(self, query: Tensor, key: Tensor, value: Tensor, programs: Sequence[RowPrograms]) -> None:
        """Decide, or take the decisions given if there are no programs, and take in the new token."""
        if not programs:
            # Without code, constants and tables are not looked at.
            nothing = self._state.signals
            self._prepare(query, key, value, self._state.rows, (), (), nothing, nothing, 0, 0)
        for asked in programs:
            program = asked.program
            each = len(program.constants) > 1 or len(program.tables) > 1
            self._prepare(
                query,
                key,
                value,
                asked.rows,
                program.code,
                asked.results,
                program.constants,
                program.tables[:, :, self._layer],
                program.constants.stride(0) if each else 0,
                program.tables.stride(0) if each else 0,
            )

    def _prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        code: tuple[int, ...],
        results: tuple[int, ...],
        constants: Tensor,
        tables: Tensor,
        constants_row: int,
        tables_row: int,
    ) -> None:
        sizes = self._sizes
        slots = power_of_2(sizes.k)
        prepare[(len(rows) * sizes.kv_heads,)](
            rows,
            query,
            key,
            value,
            self._cached,
            self.cache,
            self._sets,
            self._set_sizes,
            self._queries,
            self._decisions,
            self._scratch.modes_before,
            self._scratch.modes,
            constants,
            tables,
            self._n_all_units,
            sizes.layers * sizes.kv_heads,
            constants_row,
            tables_row,
            sizes.n_prompt,
            CODE=code,
            RESULTS=results,
            **self._wants,
            K=sizes.k,
            SLOTS=slots,
            **self._heads,
            HEAD_DIM=sizes.head_dim,
            **self._stays,
            NEWCOMER=float("inf") if self._selection.score_kept is None else 0.0,
            # All slots of a set are looked at together.
            num_warps=max(4, min(16, slots // 512)),
            # A fused sum would round otherwise than replay does.
            enable_fp_fusion=False,
        )

    def attend(self, query: Tensor) -> Tensor:
        """Keys-only refreshes and attention; as stored, `(rows, query_heads * head_dim)`."""
        scratch = self._scratch
        if self._by_keys:
            self._walk(query, scratch.modes_before, reads_values=False)
            self._choose(scratch.modes_before, modes.KEYS_ONLY)
        self._walk(query, scratch.modes, reads_values=True)
        return scratch.attended

    def settle(self) -> None:
        """New sets for the units that ran full, new ranks for the others where they are kept.

        Nothing else of the step depends on it, but the next layer's `prepare` overwrites what it reads.
        """
        scratch, score_kept = self._scratch, self._selection.score_kept
        if self._chooses:
            self._choose(scratch.modes, modes.FULL)
        if score_kept is not None:
            rank_anew[(self._sizes.units,)](
                scratch.modes,
                scratch.modes_before,
                self._sets,
                scratch.weights,
                scratch.places,
                K=self._sizes.k,
                GROUP=self._sizes.group,
                MEAN=self._selection.group == GroupPooling.MEAN,
                SCORE_KEPT=score_kept,
                # As the other engines round.
                enable_fp_fusion=False,
            )

    def choose_by_votes(self, votes: Tensor, unit_modes: Tensor, cached: Cached) -> None:
        """New sets for the units in mode FULL.

        Args:
            votes: float32 `(units, places)`: attention that chooses, pooled over the group.
            unit_modes: int8 `(units,)`.
            cached: Which tokens are chosen from.
        """
        if self._chooses or self._by_keys:
            self._choose(unit_modes, modes.FULL, votes, cached)

    def _walk(self, query: Tensor, unit_modes: Tensor, reads_values: bool) -> None:
        scratch, sizes = self._scratch, self._sizes
        # Tensor cores take 16 rows; float32 is multiplied without them, and rows of zeros take time.
        least_rows = 1 if query.dtype == torch.float32 else 16
        how = {
            **self._heads,
            "HEAD_DIM": sizes.head_dim,
            "QUERIES": 1,
            "UNITS": self._units_to,
            "TILE": self._tile,
            "READS_VALUES": reads_values,
        }
        walk[(sizes.n_programs,)](
            query,
            self._cached,
            self.cache,
            self._sets,
            unit_modes,
            scratch.weights.logits,
            scratch.parts,
            self.scaling,
            sizes.units,
            sizes.n_prompt,
            scratch.places,
            K=sizes.k,
            ROWS=max(least_rows, power_of_2(sizes.group)),
            KEEPS_SET_LOGITS=self._selection.score_kept is not None,
            **how,
            num_warps=self._machine.walk_warps,
            num_stages=self._machine.walk_stages,
        )
        merge[(sizes.units, sizes.group)](
            self._cached,
            self._sets.filled,
            self._queries,
            unit_modes,
            scratch.parts,
            scratch.weights.normaliser,
            scratch.attended,
            sizes.units,
            sizes.n_prompt,
            sizes.n_programs,
            PARTS=N_PARTS_AT_ONCE,
            **how,
            num_warps=4,
        )

    def _choose(self, unit_modes: Tensor, mode: int, votes: Tensor | None = None, cached: Cached | None = None) -> None:
        scratch, sizes, selection = self._scratch, self._sizes, self._selection
        cached = self._cached if cached is None else cached
        how = {"CHUNK": sizes.chunk_tokens, **self._stays, "num_warps": 8}
        # Smaller chunks, fewer warps and more programs: more of them wait for memory at a time.
        score[(4 * sizes.n_programs,)](
            unit_modes,
            mode,
            cached,
            scratch.weights,
            scratch.search.scores,
            # Until `pick` lists candidates there.
            scratch.search.picked.view(torch.float32) if votes is None else votes,
            scratch.search.counts,
            sizes.units,
            sizes.n_prompt,
            scratch.places,
            UNITS=self._units_to,
            **self._heads,
            BACKWARD=selection.pool_backward,
            FORWARD=selection.pool_forward,
            EDGE=power_of_2(max(1, selection.pool_backward, selection.pool_forward)),
            MEAN=selection.group == GroupPooling.MEAN,
            VOTED=votes is not None,
            **(how | {"CHUNK": max(1, sizes.chunk_tokens // 4), "num_warps": 4}),
        )
        pick[(sizes.n_programs,)](
            unit_modes,
            mode,
            cached,
            self._set_sizes,
            scratch.search,
            sizes.units,
            sizes.n_prompt,
            scratch.places,
            KV_HEADS=sizes.kv_heads,
            UNITS=self._units_to,
            CHUNKS=scratch.chunks,
            **how,
        )
        finish[(sizes.units,)](
            unit_modes,
            mode,
            cached,
            self._sets,
            self._set_sizes,
            scratch.weights,
            scratch.search,
            *self._refresh,
            self._layer,
            sizes.layers,
            sizes.n_prompt,
            scratch.places,
            K=sizes.k,
            **self._heads,
            CHUNKS=scratch.chunks,
            MEASURES=self._measures,
            **how,
        )


def power_of_2(n: int) -> int:
    """The next one that is not below `n`."""
    return 1 << (n - 1).bit_length()
