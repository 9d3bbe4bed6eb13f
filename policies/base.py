"""The one interface of the project."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

from policies.arrays import Array
from policies.per_unit import unit_shape
from policies.signals import StepSignals


class StepPolicy(ABC):
    """Decides which units run full at a decode step.

    A policy is a frozen dataclass of numbers, names and other policies. It keeps no state: everything that it may
    remember is a field of `StepSignals`. `decide` uses operators and comparisons only, so that one definition runs on
    NumPy in replay and on torch in the decoder. Conditions are written so that NaN, an unmeasured signal, leads to
    full attention: `~(similarity >= threshold)`, not `similarity < threshold`.
    """

    # Name in policy JSON and, for a plug-in, of its entry point in the group `recycler.policies`.
    kind: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Measured signals that `decide` reads, out of `MEASURED_SIGNALS`; others may be NaN."""
        return frozenset()

    @abstractmethod
    def decide(self, signals: StepSignals) -> Array:
        """Return a boolean array of the signals' shape: True where the unit runs full."""

    def unit_shapes(self) -> frozenset[tuple[int, int]]:
        """The `(layers, kv_heads)` of the per-unit parameters, also of inner policies; empty if it fits every model."""
        shapes: set[tuple[int, int]] = set()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            values = getattr(self, field.name)
            for value in (values, *values) if isinstance(values, tuple) else (values,):
                if isinstance(value, StepPolicy):
                    shapes |= value.unit_shapes()
                elif (shape := unit_shape(value)) is not None:
                    shapes.add(shape)
        return frozenset(shapes)
