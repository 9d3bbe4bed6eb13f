"""The one interface of the project."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from policies.arrays import Array
from policies.per_unit import PerUnit, as_per_unit, unit_shape
from policies.signals import StepSignals


class StepPolicy(ABC):
    """Decides which units run full at a decode step.

    A policy is a frozen dataclass of numbers, names and other policies. It keeps no state: everything that it may
    remember is a field of `StepSignals`. `decide` uses operators and comparisons only, so that one definition runs on
    NumPy in replay, on torch in the decoder, and as code inside the engines' kernels (`policy_program`). Conditions
    are written so that NaN, an unmeasured signal, leads to full attention: `~(similarity >= threshold)`, not
    `similarity < threshold`.
    """

    # Name in policy JSON and, for a plug-in, of its entry point in the group `recycler.policies`.
    kind: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Measured signals that `decide` reads, out of `MEASURED_SIGNALS`; others may be NaN.

        By default those of the policies among the fields.
        """
        return frozenset().union(*(policy.needs for policy in self.inner_policies()))

    @property
    def keys_only(self) -> PerUnit:
        """1 for units whose full decisions are keys-only refreshes (see `RefreshKeys`), 0 for those of full steps.

        By default what the policies among the fields say, and 0 where there are none.

        Raises:
            ValueError: If they say different things.
        """
        first, *others = [policy.keys_only for policy in self.inner_policies()] or [0]
        if any(other != first for other in others):
            raise ValueError(f"the policies inside of {self.kind} refresh their sets in different ways.")
        return first

    @property
    def always_full(self) -> PerUnit:
        """1 for units that decide for a full step at every step, whatever happens; 0 where that is not known.

        Of these an engine keeps no sets, unless they refresh by their keys alone.
        """
        return 0

    @property
    def highest_rate(self) -> PerUnit:
        """Full decisions per step at most, in [0, 1]: after n steps a unit has taken at most that times n, and one.

        What a burst allows comes on top. 1 where nothing limits them.
        """
        return 1

    @property
    def full_cost(self) -> PerUnit:
        """What a full decision counts in the full share: 1 for a full step, 1/2 for a keys-only refresh."""
        return as_per_unit("full_cost", 1 - np.asarray(self.keys_only) / 2, 0, 1)

    @abstractmethod
    def decide(self, signals: StepSignals) -> Array:
        """Return a boolean array of the signals' shape: True where the unit runs full, in the way of `keys_only`."""

    def unit_shapes(self) -> frozenset[tuple[int, int]]:
        """The `(layers, kv_heads)` of the per-unit parameters, also of inner policies; empty if it fits every model.

        Raises:
            TypeError: If the policy is no dataclass.
        """
        if not dataclasses.is_dataclass(self):
            name = type(self).__name__
            raise TypeError(f"{name} must be a frozen dataclass: write @dataclass(frozen=True) above class {name}.")
        shapes = {shape for value in self._values() if (shape := unit_shape(value)) is not None}
        return frozenset(shapes).union(*(policy.unit_shapes() for policy in self.inner_policies()))

    def inner_policies(self) -> tuple[StepPolicy, ...]:
        """The policies among the fields, in their order, also those in tuples."""
        return tuple(value for value in self._values() if isinstance(value, StepPolicy))

    def _values(self) -> Iterator[Any]:
        """What the fields hold, tuples also one by one; nothing for a class that is no dataclass."""
        names: list[str] = []
        if dataclasses.is_dataclass(self):
            names = [field.name for field in dataclasses.fields(self)]
        for value in (getattr(self, name) for name in names):
            yield value
            if isinstance(value, tuple):
                yield from value
