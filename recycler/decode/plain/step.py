"""The plain path's decode step: who decides, what is attended to, what is written down, one layer at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policies import StepPolicy
from recycler.decode.counts import RunningTotals, Totals, keys_only_units, setless_units, tokens_read
from recycler.decode.first_sets import FirstSets
from recycler.decode.plain.attention import StepAttention, UnitAttention
from recycler.decode.plain.units import LayerUnits


class PlainUnits:
    """The units of all layers after a prompt, for whoever runs the model and hands over each layer's attention.

    Args:
        first: What the prompt left behind.
        policy: Who decides.

    Attributes:
        n_steps: Steps that were begun.
        full: bool `(rows, layers, kv_heads)`: decisions of the last step.
        keys_only: bool of the same shape: those of them that were keys-only refreshes.
        tokens_read: float64 of the same shape: what each unit read at the last step, as `Totals` counts it.
        overruled: bool of the same shape, by reason: what wrappers overruled at the last step.
    """

    def __init__(self, first: FirstSets, policy: StepPolicy) -> None:
        layers, kv_heads = first.units
        self._policy = policy
        self._start = first.start
        shape = (first.n_rows, layers, kv_heads)
        self._by_keys = torch.from_numpy(keys_only_units(policy, shape)).to(first.positions.device)
        setless = np.asarray(setless_units(policy, shape).all(axis=(0, 2)))
        self._layers = [LayerUnits(layer, first, policy.needs, bool(setless[layer])) for layer in range(layers)]
        self.n_steps = 0
        self.full, self.keys_only = np.zeros((2, *shape), dtype=bool)
        self.tokens_read = np.zeros(self.full.shape)
        self.overruled: dict[str, np.ndarray] = {}
        self._running = RunningTotals(self.full.shape)
        # Rows that run full whatever the policy says, `(rows, 1)`; None for none.
        self._led: Tensor | None = None

    def run_full(self, rows: Tensor) -> None:
        """Run rows, bool `(rows,)`, full from the next step on."""
        self._led = rows[:, None] if self._led is None else self._led | rows[:, None]

    def attend(
        self,
        layer: int,
        query: Tensor,
        attention: StepAttention,
        token: Tensor | None,
        going: np.ndarray | None = None,
    ) -> UnitAttention:
        """Take a step with one layer; a step begins with layer 0.

        Args:
            layer: Index of the layer.
            query: `(rows, kv_heads, group, head_dim)`.
            attention: The same queries before the layer's cache, which holds this step's token.
            token: `(rows, 1)`, ids of the tokens that are fed; None if they are not known.
            going: bool `(rows,)`: rows whose step counts; None for all.

        Raises:
            ValueError: If scores pool over a layer whose heads decide apart.
        """
        units = self._layers[layer]
        reasons: dict[str, Tensor] = {}
        full = units.decide(self._policy, query, reasons, token)
        keys_only = full & self._by_keys[:, layer]
        if self._led is not None:
            full, keys_only = full | self._led, keys_only & ~self._led
        refreshed = keys_only.nonzero(as_tuple=True)
        if refreshed[0].numel():
            units.refresh_at_once(refreshed, attention.score(refreshed))
        attended = attention.attend(full & ~keys_only, units.recycled, scored=not units.setless)
        self._note(layer, full, keys_only, reasons, np.ones(len(full), dtype=bool) if going is None else going)
        units.settle(full, attended)
        return attended

    def totals(self) -> Totals:
        """What was done since the prompt."""
        return self._running.totals()

    def _note(self, layer: int, full: Tensor, keys_only: Tensor, reasons: dict[str, Tensor], going: np.ndarray) -> None:
        units = self._layers[layer]
        self.n_steps += layer == 0
        if layer == 0:
            self.overruled = {}
        in_set = units.recycled.filled.sum(-1).cpu().numpy()
        dense, going = (units.end - self._start)[:, None], going[:, None]
        self.full[:, layer], self.keys_only[:, layer] = (of.cpu().numpy() & going for of in (full, keys_only))
        done = self.full[:, layer], self.keys_only[:, layer]
        self.tokens_read[:, layer] = tokens_read(*done, dense, in_set) * going
        noted = {reason: overruled.cpu().numpy() & going for reason, overruled in reasons.items()}
        for reason, of_layer in noted.items():
            self.overruled.setdefault(reason, np.zeros_like(self.full))[:, layer] = of_layer
        self._running.add(*done, self.tokens_read[:, layer], noted, layer)
