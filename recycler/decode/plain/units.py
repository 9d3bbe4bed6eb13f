"""The units of one layer while they decode: their sets, their schedule, their queries."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from policies import GroupPooling, Schedule, StepPolicy
from recycler.decode.first_sets import FirstSets, unit_query
from recycler.decode.plain.attention import UnitAttention
from recycler.sets.recycled_set import RecycledSet, UnitIndex, select, unit_sizes
from recycler.sets.scores import group_scores, token_scores


class LayerUnits:
    """State of all `(rows, kv_heads)` units of a layer, from the end of prefill on.

    A decode step is `decide`, attention by whoever holds the cache, and `settle`. Where units refresh by their keys
    alone, `refresh_at_once` comes before the attention, and to the attention they are recycled.

    Args:
        layer: Index of the layer.
        first: What the prompt left behind.
        needs: Measured signals that the policy reads; others are not measured.
        setless: Whether nobody will ever read a set of this layer, because its units run full for ever: no set is kept.
    """

    def __init__(self, layer: int, first: FirstSets, needs: Set[str], setless: bool = False) -> None:
        self._needs, self.setless = needs, setless
        device = first.positions.device
        # Without padding a number, which broadcasts against anything.
        self._start: Tensor | int = 0
        if first.start.any():
            self._start = _by_row(first.start, device)
        self._end: Tensor | int = first.end if first.row_ends is None else _by_row(first.row_ends, device)
        self._sizes = unit_sizes(first.selection, layer, device)
        # Slots of the widest set of this layer: there may be a far wider one in another.
        self._n_slots = first.selection.widest if self._sizes is None else int(self._sizes.max())
        positions, scores = (of[layer, ..., : self._n_slots].clone() for of in (first.positions, first.scores))
        self.recycled = RecycledSet(positions, scores, first.selection, self._sizes)
        self._full_query = self._last_query = first.query[layer]
        mass = first.measured_mass(needs)[layer]
        zeros = torch.zeros_like(mass)
        self.schedule = Schedule(zeros, mass, layer)
        self._refresh_mass = zeros + float("nan")
        self._refresh_overlap = zeros + float("nan")
        self._put_off: tuple[UnitIndex, Tensor] | None = None

    @property
    def end(self) -> np.ndarray:
        """One past the last token that was seen, int64 `()` or `(rows,)`."""
        return np.asarray(self._end) if isinstance(self._end, int) else self._end[:, 0, 0].cpu().numpy()

    def decide(
        self,
        policy: StepPolicy,
        query: Tensor,
        reasons: dict[str, Tensor] | None = None,
        token: Tensor | None = None,
    ) -> Tensor:
        """Ask the policy, then take the newest token into every set; bool `(rows, kv_heads)`, True = full.

        Args:
            policy: Who decides.
            query: `(rows, kv_heads, group, head_dim)` of this step.
            reasons: Where wrappers note what they overrule.
            token: `(rows, 1)`, ids of the tokens that are fed at this step; None if they are not known.
        """
        now = unit_query(query)
        query_similarity = step_similarity = layer_similarity = None
        if "query_similarity" in self._needs:
            query_similarity = cosine_similarity(now, self._full_query, dim=-1).double()
        if "step_similarity" in self._needs:
            step_similarity = cosine_similarity(now, self._last_query, dim=-1).double()
        if "layer_similarity" in self._needs:
            # Groups are of one size, so the mean of their means is the mean over all query heads.
            means = now.mean(1, keepdim=True), self._full_query.mean(1, keepdim=True)
            layer_similarity = cosine_similarity(*means, dim=-1).double()
        self._last_query = now
        signals = self.schedule.signals(
            query_similarity,
            step_similarity,
            reasons,
            layer_similarity=layer_similarity,
            token=None if token is None else token.to(query.device),
        )
        full: Tensor = policy.decide(signals)
        self._choose_what_was_put_off(full)
        if not self.setless:
            self.recycled.admit(self._end, self._start)
        self._end += 1
        return full

    def settle(self, full: Tensor, attended: UnitAttention) -> None:
        """End a step: new sets for the units that ran full, new ranks for those that did not where they are kept.

        Args:
            full: What `decide` returned.
            attended: What attention left behind.
        """
        if attended.full[0].numel():
            self.refresh(attended.full, attended.full_probabilities)
        if self.recycled.selection.score_kept is not None:
            # A set that was chosen at this very step is ranked by what chose it.
            older = ~full[attended.recycled]
            self.rescore(tuple(index[older] for index in attended.recycled), attended.set_probabilities[older])
        self.advance(full)

    def refresh(self, units: UnitIndex, probabilities: Tensor) -> None:
        """Choose new sets for units that attended to the whole cache.

        A unit that runs full again at the next step never uses its set, so unless the policy wants to know about it,
        choosing is put off until then.

        Args:
            units: Row and KV head of each of n units.
            probabilities: `(n, group, tokens)`, their attention to the whole cache.
        """
        if self._needs & {"refresh_mass", "refresh_overlap"}:
            self.refresh_at_once(units, probabilities)
        else:
            self._full_query = self._full_query.index_put(units, self._last_query[units])
            self._put_off = units, probabilities

    def refresh_at_once(self, units: UnitIndex, probabilities: Tensor) -> None:
        """Choose new sets to be attended to at this very step; arguments are those of `refresh`."""
        self._full_query = self._full_query.index_put(units, self._last_query[units])
        self._choose(units, probabilities)

    def rescore(self, units: UnitIndex, probabilities: Tensor) -> None:
        """Let the attention of a recycled step over its set re-rank the set, where the selection asks for it.

        Args:
            units: Row and KV head of each of n units.
            probabilities: `(n, group, k)`, their attention to the slots of their sets.
        """
        selection = self.recycled.selection
        if selection.score_kept is None or not units[0].numel():
            return
        scores = group_scores(self._by_layer(units, probabilities), selection.group).flatten(0, -2).float()
        self.recycled.scores[units] = self.recycled.scores[units] * selection.score_kept + scores

    def advance(self, full: Tensor) -> None:
        """End the step."""
        self.schedule.advance(full, self._refresh_mass, self._refresh_overlap)

    def _choose_what_was_put_off(self, full: Tensor) -> None:
        if self._put_off is not None:
            units, probabilities = self._put_off
            recycled = ~full[units]
            if recycled.any():
                self._choose(tuple(index[recycled] for index in units), probabilities[recycled])
            self._put_off = None

    def _choose(self, units: UnitIndex, probabilities: Tensor) -> None:
        start, end = (of if isinstance(of, int) else of[units[0], 0] for of in (self._start, self._end))
        selection = self.recycled.selection
        scores = token_scores(self._by_layer(units, probabilities), selection).flatten(0, -2)
        chosen = select(scores, selection, start, end, None if self._sizes is None else self._sizes[units[1]])
        if "refresh_overlap" in self._needs:
            before = RecycledSet(self.recycled.positions[units], self.recycled.scores[units], selection)
            kept = before.holds(scores.shape[-1]).gather(-1, chosen.positions.clamp(min=0)) & chosen.filled
            self._refresh_overlap[units] = kept.sum(-1).double() / chosen.filled.sum(-1)
        if "refresh_mass" in self._needs:
            self._refresh_mass[units] = chosen.recovered_mass(probabilities).double()
        self.recycled.positions[units] = chosen.positions[..., : self._n_slots]
        self.recycled.scores[units] = chosen.scores[..., : self._n_slots]

    def _by_layer(self, units: UnitIndex, probabilities: Tensor) -> Tensor:
        """`(n, group, tokens)`, or `(n / kv_heads, kv_heads, group, tokens)` where scores pool over the layer."""
        if self.recycled.selection.group != GroupPooling.LAYER_MEAN:
            return probabilities
        kv_heads = self._last_query.shape[1]
        whole_layers = torch.arange(kv_heads, device=units[1].device).repeat(len(units[1]) // kv_heads)
        if not torch.equal(units[1], whole_layers):
            raise ValueError(
                "a selection with group 'layer_mean' needs all KV heads of a layer to run full together, all by full "
                "steps or all by their keys alone, and this policy decides otherwise."
            )
        by_layer: Tensor = probabilities.unflatten(0, (-1, kv_heads))
        return by_layer


def _by_row(places: np.ndarray, device: torch.device) -> Tensor:
    """int64 `(rows, 1, 1)`."""
    return torch.tensor(places, device=device)[:, None, None]
