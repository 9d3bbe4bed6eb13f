"""What a schedule remembers of its units, kept alike by the decoder and by replay."""

from __future__ import annotations

from policies.arrays import Array, where
from policies.signals import StepSignals, Tables


class Schedule:
    """Counters of some units from the end of prefill on.

    Args:
        zeros: float64 array of zeros over the units; sets shape, library and device.
        refresh_mass: Recovered mass of the sets that prefill chose, or None if not measured.
        layer: Layer that the units belong to, or None when a layer axis is among theirs.
    """

    def __init__(self, zeros: Array, refresh_mass: Array | None = None, layer: int | None = None) -> None:
        self._unmeasured = zeros + float("nan")
        self._layer = layer
        self.tables: Tables = {}
        self.step = zeros
        self.age = zeros + 1
        self.n_full = zeros
        self.refresh_mass = self._unmeasured if refresh_mass is None else refresh_mass
        self.refresh_overlap = self._unmeasured

    def signals(
        self,
        query_similarity: Array | None = None,
        step_similarity: Array | None = None,
        reasons: dict[str, Array] | None = None,
        *,
        layer_similarity: Array | None = None,
        token: Array | None = None,
    ) -> StepSignals:
        """What a policy sees at the coming step; what is not given was not measured.

        `layer_similarity` and `token`, ids of any numeric type, may be of a shape that broadcasts to that of the units.
        """
        return StepSignals(
            step=self.step,
            age=self.age,
            n_full=self.n_full,
            query_similarity=self._unmeasured if query_similarity is None else query_similarity,
            step_similarity=self._unmeasured if step_similarity is None else step_similarity,
            layer_similarity=self._for_units(layer_similarity),
            refresh_mass=self.refresh_mass,
            refresh_overlap=self.refresh_overlap,
            token=self._for_units(token),
            layer=self._layer,
            reasons=reasons,
            tables=self.tables,
        )

    def _for_units(self, values: Array | None) -> Array:
        return self._unmeasured if values is None else values + 0 * self.age

    def advance(self, full: Array, refresh_mass: Array | None = None, refresh_overlap: Array | None = None) -> None:
        """Take a step: `full` units start again at age 1 with the measurements given, the others grow older.

        A measurement that is not given was not made: it is NaN for units that ran full.
        """
        self.step = self.step + 1
        self.n_full = self.n_full + full
        self.age = where(full, 0 * self.age, self.age) + 1
        fresh_mass = self._unmeasured if refresh_mass is None else refresh_mass
        fresh_overlap = self._unmeasured if refresh_overlap is None else refresh_overlap
        self.refresh_mass = where(full, fresh_mass, self.refresh_mass)
        self.refresh_overlap = where(full, fresh_overlap, self.refresh_overlap)
