"""Policies that no kernel can run: called on NumPy, layer by layer."""

from __future__ import annotations

import numpy as np

from policies import QUERY_SIGNALS, SIGNALS, StepPolicy, StepSignals
from policies.signals import Tables


class HostDecisions:
    """Asks a policy for the units of one layer after the other.

    Args:
        policy: The policy.

    Attributes:
        policy: The policy.
        in_layers: Whether it reads the step's query, and so cannot be asked before the step.
    """

    def __init__(self, policy: StepPolicy) -> None:
        self.policy = policy
        self.in_layers = not policy.needs.isdisjoint(QUERY_SIGNALS)
        self._tables: Tables = {}

    def decide(self, layer: int, signals: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Ask for a layer.

        Args:
            layer: Its index.
            signals: float64 `(signals, rows, kv_heads)`, in the order of `SIGNALS`.

        Returns:
            bool `(rows, kv_heads)`: the decisions; and what wrappers overruled, of the same shape, by reason.
        """
        reasons: dict[str, np.ndarray] = {}
        named = dict(zip(SIGNALS, signals, strict=True))
        full = self.policy.decide(StepSignals(**named, layer=layer, reasons=reasons, tables=self._tables))
        return np.asarray(full, dtype=bool), reasons
