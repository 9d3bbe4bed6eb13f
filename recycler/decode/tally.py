"""What becomes a receipt, added up run by run."""

from __future__ import annotations

import numpy as np

from recycler.decode.counts import Totals
from recycler.decode.governor import GovernedWindow
from recycler.decode.receipt import Receipt
from recycler.decode.round_counts import RoundCounts

# Engines whose kernels do all of a step.
_WHOLE = {"cpu", "cuda"}


class Tally:
    """Adds up what becomes a receipt.

    Args:
        units: `(layers, kv_heads)`.
    """

    def __init__(self, units: tuple[int, int]) -> None:
        self._engines: list[str] = []
        self._n_steps = self._n_rows = self._row_steps = self._longest_steps = 0
        self._full_steps, self._keys_only_steps, self._tokens_dense = np.zeros((3, *units), dtype=np.int64)
        self._tokens_read = np.zeros(units)
        self._reasons: dict[str, np.ndarray] = {}
        self._audited_kl: list[np.ndarray] = []
        self._audit_tokens_read = 0
        self._governed: tuple[GovernedWindow, ...] = ()
        self._rounds: RoundCounts | None = None

    @property
    def n_steps(self) -> int:
        """Decode steps that were added."""
        return self._n_steps

    def add_run(
        self, engine: str, n_steps: int, tokens_dense: int, totals: Totals, rounds: RoundCounts | None = None
    ) -> None:
        """Add steps that an engine took with all layers.

        Args:
            engine: What ran them.
            n_steps: How many.
            tokens_dense: Tokens in the cache, summed over rows and steps.
            totals: What was done.
            rounds: What its rounds came to, if it decoded in rounds.
        """
        n_rows = len(totals.full_steps)
        if engine not in self._engines:
            self._engines.append(engine)
        self._n_steps += n_steps
        self._longest_steps = max(self._longest_steps, n_steps)
        self._n_rows = max(self._n_rows, n_rows)
        self._add_rounds(rounds)
        self._row_steps += n_rows * n_steps
        self._full_steps += totals.full_steps.sum(0)
        self._keys_only_steps += totals.keys_only_steps.sum(0)
        self._tokens_read += totals.tokens_read.sum(0)
        self._tokens_dense += tokens_dense
        for reason, overruled in totals.reasons.items():
            table = self._reasons.setdefault(reason, np.zeros_like(self._full_steps))
            table += overruled.sum(0)

    def add_audit(self, kl: np.ndarray, tokens_read: int, governed: tuple[GovernedWindow, ...] = ()) -> None:
        """Add an audit, or what several have found.

        Args:
            kl: `(rows, steps)`, in nats.
            tokens_read: Tokens of the cache that a unit read for it, summed over rows.
            governed: What was steered by it.
        """
        if kl.size:
            self._audited_kl.append(kl.ravel())
        self._audit_tokens_read += tokens_read
        self._governed += governed

    def add(self, receipt: Receipt) -> None:
        """Add all that a receipt tells, but for why."""
        if not receipt.n_steps:
            return
        self._engines += [engine for engine in receipt.engine.split("+") if engine not in self._engines]
        self._n_steps += receipt.n_steps
        self._longest_steps = max(self._longest_steps, receipt.longest_steps)
        self._n_rows = max(self._n_rows, receipt.n_rows)
        self._row_steps += receipt.row_steps
        self._full_steps += receipt.full_steps
        self._keys_only_steps += receipt.keys_only_steps
        self._tokens_read += receipt.tokens_read
        self._tokens_dense += receipt.tokens_dense
        self.add_audit(receipt.audited_kl, receipt.audit_tokens_read, receipt.governed)
        self._add_rounds(receipt.rounds)
        for reason, overruled in receipt.reasons.items():
            table = self._reasons.setdefault(reason, np.zeros_like(self._full_steps))
            table += overruled

    def _add_rounds(self, rounds: RoundCounts | None) -> None:
        if rounds is not None:
            self._rounds = rounds if self._rounds is None else self._rounds + rounds

    def receipt(self, why_plain: str, horizon_steps: int | None, notes: tuple[str, ...] = ()) -> Receipt:
        """What was added so far."""
        return Receipt(
            engine="+".join(self._engines) or "none",
            n_steps=self._n_steps,
            n_rows=self._n_rows,
            row_steps=self._row_steps,
            full_steps=self._full_steps.copy(),
            keys_only_steps=self._keys_only_steps.copy(),
            tokens_read=self._tokens_read.copy(),
            tokens_dense=self._tokens_dense.copy(),
            reasons={reason: units.copy() for reason, units in self._reasons.items()},
            # A session may have begun elsewhere.
            why_plain="" if set(self._engines) <= _WHOLE else why_plain,
            longest_steps=self._longest_steps,
            horizon_steps=horizon_steps,
            notes=notes,
            audited_kl=np.concatenate([np.zeros(0, dtype=np.float32), *self._audited_kl]),
            audit_tokens_read=self._audit_tokens_read,
            governed=self._governed,
            rounds=self._rounds,
        )
