"""What a policy may look at when it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.arrays import Array, like
from policies.per_unit import PerUnit

# Signals that cost a measurement; `StepPolicy.needs` names those that a policy reads.
MEASURED_SIGNALS = frozenset(
    {"query_similarity", "step_similarity", "layer_similarity", "refresh_mass", "refresh_overlap"}
)

# Those of them that the query of the step itself makes; all else is known before the step.
QUERY_SIGNALS = ("query_similarity", "step_similarity", "layer_similarity")

# Parameters and their arrays, by what they were made of and for.
Tables = dict[tuple[Any, ...], tuple[PerUnit, Array]]
# Arrays kept at most; only a policy that makes its parameters anew at every step gets there.
_MOST_TABLES = 4096


@dataclass(frozen=True)
class StepSignals:
    """The state of some units just before a decode step.

    Every field is a float64 array over units, of one shape: `(rows, kv_heads)` inside a layer of the decoder,
    `(traces, layers, kv_heads)` in replay. A signal that was not measured, or is not known, is NaN.

    Attributes:
        step: Decode steps taken before this one; 0 at the first step after prefill.
        age: Age that the recycled set has if it is used now, in steps, at least 1. Prefill ends with a full step, so
            it is 1 at step 0.
        n_full: Decode steps that the unit ran full before this one, keys-only refreshes included. Prefill does not
            count.
        query_similarity: Cosine in [-1, 1] between the unit's query now and at its last full step. A unit's query is
            the mean over the query heads of its group, after rotary embedding.
        step_similarity: The same cosine against the query of the previous step.
        layer_similarity: Cosine in [-1, 1] between the mean query of the whole layer now, over all its query heads, and
            the mean over its KV heads of each unit's query at its own last full step. Where the units of a layer run
            full together, that is the head-averaged query of the layer's last full step (RefreshKV). The same for all
            units of a layer and row. Traces do not record it.
        refresh_mass: Recovered mass in [0, 1] of the set at the step that chose it, measured on that step's query.
        refresh_overlap: Overlap in [0, 1] between the set chosen at the last full step and the set that it replaced.
            NaN until the unit's first full step after prefill.
        token: Id of the token that is fed at this step, the same for all units of a row; NaN where the model is fed
            embeddings. It costs nothing, so every decoder gives it, asked or not.
        layer: Layer that the arrays belong to, or None when a layer axis is among them.
        reasons: Where `because` notes what a wrapper overruled, or None when nobody asks.
        tables: Where `per_unit` keeps the arrays that it made, for the next step of the same schedule; None to make
            them anew.
    """

    step: Array
    age: Array
    n_full: Array
    query_similarity: Array
    step_similarity: Array
    layer_similarity: Array
    refresh_mass: Array
    refresh_overlap: Array
    token: Array
    layer: int | None = None
    reasons: dict[str, Array] | None = None
    tables: Tables | None = None

    def per_unit(self, parameter: PerUnit) -> Array:
        """Bring a policy's parameter to the units at hand.

        A number stays a number; a `(layers, kv_heads)` table becomes an array of the library, dtype and device of the
        signals, cut to `layer` where there is one, so that it broadcasts against them.
        """
        if isinstance(parameter, (int, float)):
            return parameter
        if self.tables is None or not isinstance(parameter, tuple):
            return self._array(parameter)
        key = id(parameter), self.layer, type(self.age), getattr(self.age, "device", None)
        kept = self.tables.get(key)
        if kept is None:
            if len(self.tables) >= _MOST_TABLES:
                self.tables.clear()
            # The parameter is kept too, so that no other object gets its id.
            kept = self.tables[key] = parameter, self._array(parameter)
        return kept[1]

    def _array(self, parameter: Any) -> Array:
        return like(parameter if self.layer is None else parameter[self.layer], self.age)

    def because(self, reason: str, units: Array) -> None:
        """Note that `reason` overruled the inner policy for `units` (boolean), for the receipt."""
        if self.reasons is not None:
            noted = self.reasons.get(reason)
            self.reasons[reason] = units if noted is None else noted | units
