"""A policy of its own for every row of a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from policies import StepPolicy, StepSignals
from policies.arrays import Array


@dataclass(frozen=True)
class PerRow(StepPolicy):
    """Row i of the batch follows `rows[i]`.

    Many policies are compared on one prompt at the price of reading the weights once. A tool of measurement: it has no
    place in a policy file, and its receipt names no reasons. Rows may refresh their sets in different ways: then
    `keys_only` raises, and `recycler.decode.counts.keys_only_units` asks them one by one.

    Attributes:
        rows: As many policies as the batch has rows.
    """

    rows: tuple[StepPolicy, ...]
    kind: ClassVar[str] = "per_row"

    def decide(self, signals: StepSignals) -> Array:
        self.check_rows(signals.age.shape[0])
        decisions = [policy.decide(_row(signals, row)) for row, policy in enumerate(self.rows)]
        return np.concatenate(decisions) if isinstance(decisions[0], np.ndarray) else torch.cat(decisions)

    def check_rows(self, n_rows: int) -> None:
        """Raise ValueError unless the batch has a row for every policy."""
        if n_rows != len(self.rows):
            raise ValueError(f"{len(self.rows)} policies cannot decide for a batch of {n_rows} rows.")


def _row(signals: StepSignals, row: int) -> StepSignals:
    arrays = {
        field.name: getattr(signals, field.name)[row : row + 1]
        for field in dataclasses.fields(signals)
        if field.name not in ("layer", "reasons", "tables")
    }
    return StepSignals(layer=signals.layer, tables=signals.tables, **arrays)
