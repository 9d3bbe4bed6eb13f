"""Rows whose keys, queries or logits are no numbers: their batch goes on, they run full, and somebody is told."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class NotNumbers:
    """Watches a prompt and its output's logits. What a device saw is told when somebody asks, so that no step waits."""

    def __init__(self) -> None:
        self._n_steps = 0
        # Step of each row's first NaN, 0 if its prompt had one; -1 for none.
        self._since: Tensor | None = None
        self._n_told = 0

    def see(self, logits: Tensor) -> Tensor | None:
        """Look at a step, `(rows, vocabulary)`; on the CPU a row that turns bad warns at once.

        Returns:
            bool `(rows,)`: which are bad; None where that is known to be none.
        """
        self._n_steps += 1
        # A maximum passes a NaN on, in one reading of the logits.
        return self._note(logits.amax(-1).isnan(), self._n_steps)

    def see_prompt(self, bad: Tensor) -> Tensor | None:
        """Rows that are bad, bool `(rows,)`: those of a prompt, given, and of the output that it goes on; as `see`."""
        self._note(bad, 0 if self._n_steps == 0 else self._n_steps)
        assert self._since is not None
        return self._if_any(self._since >= 0)

    def _note(self, bad: Tensor, step: int) -> Tensor | None:
        if self._since is None or len(self._since) != len(bad):
            self._since = torch.full((len(bad),), -1, dtype=torch.int64, device=bad.device)
        self._since = torch.where(bad & (self._since < 0), step, self._since)
        return self._if_any(bad)

    def _if_any(self, bad: Tensor) -> Tensor | None:
        if bad.device.type != "cpu":
            return bad
        if not bad.any():
            return None
        self.tell()
        return bad

    def sentences(self) -> tuple[str, ...]:
        """One for each bad row."""
        since = [] if self._since is None else self._since.tolist()
        where = {step: f"among its logits from step {step} on" if step else "in its prompt" for step in since}
        return tuple(
            f"row {row} has NaN {where[step]}, and runs full from there: what it wrote means nothing."
            for row, step in enumerate(since)
            if step >= 0
        )

    def tell(self) -> None:
        """Warn of rows that nobody was warned of yet."""
        found = self.sentences()
        if len(found) > self._n_told:
            self._n_told = len(found)
            warnings.warn(" ".join(found), stacklevel=2)
