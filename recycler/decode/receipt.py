"""The receipt of a run: what was really applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from policies import written_by
from recycler.decode.governor import GovernedWindow
from recycler.decode.round_counts import RoundCounts


@dataclass(frozen=True)
class Receipt:
    """What every unit did, summed over rows and decode steps.

    Attributes:
        engine: What computed the attention: "plain", or the name of an engine; both, joined by "+", if some prompts
            were decoded on one and some on the other.
        why_plain: Why the plain path was taken, or the model's own modules ran, as a clause; empty if neither did.
        n_steps: Decode steps; prefill is none.
        n_rows: Rows of the largest batch.
        row_steps: Decode steps, each counted once per row of its batch.
        full_steps: int `(layers, kv_heads)`: unit-steps that ran full, keys-only refreshes included.
        keys_only_steps: int `(layers, kv_heads)`: those of them that were keys-only refreshes.
        tokens_read: float64 `(layers, kv_heads)`: what was read of the cache, in tokens: keys and values of one token
            count 1, keys alone one half.
        tokens_dense: int `(layers, kv_heads)`: tokens that full attention would have read.
        reasons: Unit-steps `(layers, kv_heads)` in which a wrapper overruled its policy, by reason: `max_age` asked for
            a full step, `budget` denied one. A budget outside a limit of age may deny what that limit asked for; such a
            unit-step counts under both.
        longest_steps: Decode steps of the longest output.
        horizon_steps: Decode steps of the outputs that the policy was tuned on; None if that is not known.
        notes: Sentences on how the model differs from the one that the policy was tuned on, and on rows whose logits
            were no numbers.
        audited_kl: float32 `(n,)`: of the row-steps that were audited, the divergence of the next token's distribution
            from full attention's, in nats.
        audit_tokens_read: What audits read of the cache, in tokens per unit, summed over rows.
        governed: Budget and divergence between two audits each, where `govern_kl` steered the budget.
        rounds: What drafts and verifications came to, where logits are full attention's; None elsewhere. A verification
            of a row counts as a full step then, whatever the number of its tokens, and its reading like that of one.
            Shares are of the tokens that were fed: where few drafts hold they may be above 1.
    """

    engine: str
    n_steps: int
    n_rows: int
    row_steps: int
    full_steps: np.ndarray
    keys_only_steps: np.ndarray
    tokens_read: np.ndarray
    tokens_dense: np.ndarray
    reasons: Mapping[str, np.ndarray] = field(default_factory=dict)
    why_plain: str = ""
    longest_steps: int = 0
    horizon_steps: int | None = None
    notes: tuple[str, ...] = ()
    audited_kl: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    audit_tokens_read: int = 0
    governed: tuple[GovernedWindow, ...] = ()
    rounds: RoundCounts | None = None

    @property
    def beyond_horizon(self) -> str:
        """A sentence where an output was more than twice as long as those that the policy was tuned on; else empty."""
        if self.horizon_steps is None or self.longest_steps <= 2 * self.horizon_steps:
            return ""
        return (
            f"the longest output has {self.longest_steps} decode steps, and the policy was tuned on "
            f"{self.horizon_steps}: how far it is from full attention beyond twice of that was not measured; "
            "tune with more --steps."
        )

    @property
    def unit_full_share(self) -> np.ndarray:
        """Full share in [0, 1] per `(layer, kv_head)`; NaN before the first decode step."""
        counted = self.full_steps - self.keys_only_steps / 2
        return counted / self.row_steps if self.row_steps else np.full(self.full_steps.shape, np.nan)

    @property
    def full_share(self) -> float:
        """Share of all unit-steps that ran full, a keys-only refresh counted half; NaN before the first decode step."""
        return float(self.unit_full_share.mean())

    @property
    def keys_only_share(self) -> float:
        """Share of unit-steps that were keys-only refreshes, each counted whole; NaN before the first decode step."""
        return float(self.keys_only_steps.mean() / self.row_steps) if self.row_steps else float("nan")

    @property
    def read_share(self) -> float:
        """KV bytes read as a share of what full attention reads at every step; NaN before the first decode step.

        Audits read too.
        """
        dense = int(self.tokens_dense.sum())
        read = float(self.tokens_read.sum()) + self.audit_tokens_read * self.tokens_read.size
        return read / dense if dense else float("nan")

    @property
    def audit(self) -> dict[str, float] | None:
        """What audits found: `row_steps`, and `kl_mean`, `kl_p95` of those that are finite; None if none is."""
        kl = self.audited_kl[np.isfinite(self.audited_kl)].astype(np.float64)
        if not kl.size:
            return None
        return {"row_steps": kl.size, "kl_mean": float(kl.mean()), "kl_p95": float(np.quantile(kl, 0.95))}

    @property
    def sentence(self) -> str:
        """Totals in one line."""
        if not self.n_steps:
            return "no decode step was taken"
        if self.rounds is not None:
            return (
                f"{self.n_steps} exact steps x {self.n_rows} rows on engine {self.engine}, "
                f"{self.rounds.tokens_per_round:.2f} tokens per verification: "
                f"{self.read_share:.1%} of the dense KV traffic"
            )
        return (
            f"{self.n_steps} steps x {self.n_rows} rows on engine {self.engine}: "
            f"{self.full_share:.1%} of unit-steps full, {self.read_share:.1%} of the dense KV traffic"
        )

    def to_json(self) -> dict[str, Any]:
        """Totals, plain numbers, and the version that counted; a share of no steps is None: JSON has no NaN."""
        decoded = self.n_steps > 0
        return {
            "engine": self.engine,
            "why_plain": self.why_plain or None,
            "n_steps": self.n_steps,
            "n_rows": self.n_rows,
            "full_share": self.full_share if decoded else None,
            "keys_only_share": self.keys_only_share if decoded else None,
            "read_share": self.read_share if decoded else None,
            "reasons": {reason: int(units.sum()) for reason, units in self.reasons.items()},
            "longest_steps": self.longest_steps,
            "horizon_steps": self.horizon_steps,
            "notes": list(self.notes),
            "audit": self.audit,
            "governed": [[window.budget, None if np.isnan(window.kl) else window.kl] for window in self.governed]
            or None,
            "rounds": None if self.rounds is None else dataclasses.asdict(self.rounds),
            "written_by": written_by(),
        }

    def print(self, console: Console) -> None:
        """Print totals, then full share per layer and head."""
        unit_steps = self.row_steps * self.full_steps.size
        console.print(self.sentence)
        if self.keys_only_steps.any():
            console.print(
                f"  {self.keys_only_share:.1%} of unit-steps refreshed their sets by keys alone, each counted as half "
                "a full one"
            )
        if self.audit is not None:
            console.print(
                f"  audited: {self.audit['row_steps']} of {self.row_steps} steps of rows, KL to full attention "
                f"{self.audit['kl_mean']:.3g} nats in the mean, {self.audit['kl_p95']:.3g} at the 95th percentile"
            )
        if self.rounds is not None:
            console.print(
                f"  exact: {self.rounds.n_rounds} verifications of rows, {self.rounds.n_accepted} of "
                f"{self.rounds.n_drafts} drafts held"
            )
        if self.governed:
            budgets = " ".join(f"{100 * window.budget:.2g}" for window in self.governed)
            console.print(f"  governed: budgets between audits, in percent: {budgets}")
        if self.why_plain:
            console.print(f"  engine {self.engine} because {self.why_plain}")
        for note in (*self.notes, self.beyond_horizon):
            if note:
                console.print(f"  {note}")
        for reason, units in self.reasons.items():
            verb = {"budget": "denied a full step", "max_age": "asked for a full step"}.get(
                reason, "overruled the policy"
            )
            console.print(f"  {reason} {verb} in {units.sum() / max(unit_steps, 1):.1%} of unit-steps")
        counted = "full share" if self.rounds is None else "looks at the whole cache per token"
        console.print(f"{counted} per unit in percent, a row per layer and a column per KV head:")
        table = Table()
        table.add_column("layer", justify="right")
        for head in range(self.full_steps.shape[1]):
            table.add_column(str(head), justify="right", no_wrap=True)
        for layer, shares in enumerate(self.unit_full_share):
            table.add_row(str(layer), *("-" if np.isnan(share) else f"{100 * share:.0f}" for share in shares))
        console.print(table)
