"""Rows whose logits are no numbers: their batch goes on, they run full, and somebody is told."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class NotNumbers:
    """Watches the logits of an output. What a device saw is told when somebody asks, so that no step waits."""

    def __init__(self) -> None:
        self._n_steps = 0
        # Step of each row's first NaN; -1 for none.
        self._since: Tensor | None = None
        self._n_told = 0

    def see(self, logits: Tensor) -> Tensor | None:
        """Look at a step, `(rows, vocabulary)`; on the CPU a row that turns bad warns at once.

        Returns:
            bool `(rows,)`: which are bad; None where that is known to be none.
        """
        # A maximum passes a NaN on, in one reading of the logits.
        bad = logits.amax(-1).isnan()
        if self._since is None or len(self._since) != len(bad):
            self._since = torch.full((len(bad),), -1, dtype=torch.int64, device=bad.device)
        self._n_steps += 1
        self._since = torch.where(bad & (self._since < 0), self._n_steps, self._since)
        if bad.device.type != "cpu":
            return bad
        if not bad.any():
            return None
        self.tell()
        return bad

    @property
    def bad_rows(self) -> Tensor | None:
        """bool `(rows,)`: which were bad at some step; None before the first one."""
        return None if self._since is None else self._since > 0

    def sentences(self) -> tuple[str, ...]:
        """One for each bad row."""
        since = [] if self._since is None else self._since.tolist()
        return tuple(
            f"row {row} has NaN among its logits from step {step} on, and runs full from there: what it wrote means "
            "nothing."
            for row, step in enumerate(since)
            if step > 0
        )

    def tell(self) -> None:
        """Warn of rows that nobody was warned of yet."""
        found = self.sentences()
        if len(found) > self._n_told:
            self._n_told = len(found)
            warnings.warn(" ".join(found), stacklevel=2)
