"""What a tuning run found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies import ModelShape, Selection, StepPolicy
from traces.reporting.estimate import Estimate, bootstrap, bootstrap_ratio
from tuning.certify.certificate import Certificate
from tuning.certify.ladder import Ladder


@dataclass(frozen=True)
class Measured:
    """A policy in replay and in closed loop on the held-out prompts.

    Attributes:
        label: What tables and pictures call it.
        policy: The policy.
        replay_full_share: Full share in replay, on the tuning prompts.
        recovered_mass: Mean recovered mass there, in [0, 1]; NaN if it ran with other sets than the traces hold.
        prompt_kl: float64 `(prompts,)`: mean over steps of KL(full || policy), nats.
        prompt_agreement: float64 `(prompts,)`: share of steps with the same most likely token as full attention.
        prompt_accuracy: float64 `(prompts,)`: share of steps whose most likely token is the text's next one.
        prompt_full_share: float64 `(prompts,)`: full share in closed loop.
        unit_full_share: float64 `(layers, kv_heads)`: full share in closed loop per unit.
    """

    label: str
    policy: StepPolicy
    replay_full_share: float
    recovered_mass: float
    prompt_kl: np.ndarray
    prompt_agreement: np.ndarray
    prompt_accuracy: np.ndarray
    prompt_full_share: np.ndarray
    unit_full_share: np.ndarray

    @property
    def kl(self) -> Estimate:
        """KL to full attention per step, nats."""
        return bootstrap(self.prompt_kl)

    @property
    def agreement(self) -> Estimate:
        """Next-token agreement with full attention, in [0, 1]."""
        return bootstrap(self.prompt_agreement)

    @property
    def full_share(self) -> float:
        """Full share in closed loop."""
        return float(self.prompt_full_share.mean())


@dataclass(frozen=True)
class FamilyResult:
    """The winner of a family.

    Attributes:
        family: Its name.
        parameters: What the search chose, plain numbers.
        measured: The winner on the held-out prompts.
        tune_kl: Mean KL in closed loop on the tuning prompts, by which the best family was chosen; None if that was
            done at another budget.
        trials: `(full share, loss)` in replay of every trial, float64 `(trials, 2)`.
    """

    family: str
    parameters: Mapping[str, Any]
    measured: Measured
    tune_kl: float | None
    trials: np.ndarray


@dataclass(frozen=True)
class TuningResult:
    """Everything that the table, the report and the last JSON line are made of.

    Attributes:
        model: Shape and name of the model.
        selection: How sets were chosen, by all policies alike.
        budget: Share of unit-steps that may run full.
        families: Winners, best `tune_kl` first; the first one is exported. With a ladder the best family alone.
        baseline: Fixed stride of 1 / budget, all units at once, same selection.
        references: Other policies at other budgets, for the Pareto front.
        prompt_kinds: Kind of text of each held-out prompt, `(prompts,)`.
        prompt_names: Their names.
        tune_names: Names of the prompts that were tuned on.
        n_steps: Decode steps per prompt.
        context_tokens: Prompt tokens per prompt, mean.
        versions: Of the packages that shaped the numbers.
        ladder: The policies among which the budget was chosen, the exported one included; None if it was given.
    """

    model: ModelShape
    selection: Selection
    budget: float
    families: Sequence[FamilyResult]
    baseline: Measured
    references: Sequence[Measured]
    prompt_kinds: Sequence[str]
    prompt_names: Sequence[str]
    tune_names: Sequence[str]
    n_steps: int
    context_tokens: float
    versions: Mapping[str, str]
    ladder: Ladder | None = None

    def __post_init__(self) -> None:
        if self.ladder is not None and (
            self.ladder.chosen is None or self.ladder.chosen.label != self.best.measured.label
        ):
            raise ValueError(f"{self.best.measured.label} is exported, but it is not what the ladder chooses.")

    @property
    def best(self) -> FamilyResult:
        """The family that was exported."""
        return self.families[0]

    @property
    def certificate(self) -> Certificate | None:
        """What is certified of the exported policy; None if nothing was asked for."""
        if self.ladder is None or self.ladder.chosen is None:
            return None
        return self.ladder.chosen.certificate

    def kl_ratio(self, measured: Measured) -> Estimate:
        """KL of a policy as a share of the baseline's, over the same prompts."""
        return bootstrap_ratio(measured.prompt_kl, self.baseline.prompt_kl)

    def kl_by_kind(self, measured: Measured) -> dict[str, float]:
        """Mean KL per kind of text, nats."""
        kinds = np.asarray(self.prompt_kinds)
        return {kind: float(measured.prompt_kl[kinds == kind].mean()) for kind in dict.fromkeys(self.prompt_kinds)}
