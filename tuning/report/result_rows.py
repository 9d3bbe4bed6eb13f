"""What tables, pictures and the report say about each policy of a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from policies import StepPolicy
from traces.reporting.estimate import Estimate
from tuning.confirm.results import Measured, TuningResult

# Nats per step that two orders of summation make in float32: a share of such a divergence says nothing.
_ROUNDING_KL = 1e-7


class Role(StrEnum):
    """Why a policy is part of a result."""

    EXPORTED = "exported"
    FAMILY = "family"
    BASELINE = "baseline"
    REFERENCE = "reference"


@dataclass(frozen=True)
class ResultRow:
    """One policy with its intervals, each computed once.

    Attributes:
        role: Why it is there.
        measured: The policy on the held-out prompts.
        parameters: What the search chose; for other policies what they are made of.
        kl: KL to full attention per step, nats.
        kl_share: KL as a share of the baseline's; None where the baseline has none.
        agreement: Next-token agreement with full attention, in [0, 1].
        tune_kl: KL in closed loop on the tuning prompts, nats; None if the policy was not searched for.
    """

    role: Role
    measured: Measured
    parameters: str
    kl: Estimate
    kl_share: Estimate | None
    agreement: Estimate
    tune_kl: float | None = None

    @property
    def label(self) -> str:
        """What to call the policy."""
        return self.measured.label


def result_rows(result: TuningResult) -> list[ResultRow]:
    """The exported policy, the winners of the other families, the baseline and the references, in this order."""

    def row(role: Role, measured: Measured, parameters: Mapping[str, Any], tune_kl: float | None = None) -> ResultRow:
        return ResultRow(
            role=role,
            measured=measured,
            parameters=compact(parameters),
            kl=measured.kl,
            kl_share=kl_share(result, measured),
            agreement=measured.agreement,
            tune_kl=tune_kl,
        )

    families = [
        row(Role.FAMILY if number else Role.EXPORTED, family.measured, family.parameters, family.tune_kl)
        for number, family in enumerate(result.families)
    ]
    baseline = row(Role.BASELINE, result.baseline, _own_parameters(result.baseline.policy))
    references = [row(Role.REFERENCE, other, _own_parameters(other.policy)) for other in result.references]
    return [*families, baseline, *references]


def kl_share(result: TuningResult, measured: Measured) -> Estimate | None:
    """KL as a share of the baseline's; None where the baseline has no KL to share, as with a budget of 1."""
    return result.kl_ratio(measured) if (result.baseline.prompt_kl > _ROUNDING_KL).all() else None


def share_of_baseline(result: TuningResult, row: ResultRow) -> str:
    """How a policy's KL compares with the baseline's, as the end of a sentence; no more than the interval allows."""
    baseline = f"that of {result.baseline.label} at the same budget"
    share = row.kl_share
    if share is None:
        return "the baseline loses nothing at this budget, so there is nothing to compare with"
    numbers = f"{whole_percent(share.value)} (95% interval {interval(share, whole_percent, ' to ')})"
    if share.low <= 1 <= share.high:
        return f"not clearly different from {baseline}: {numbers}"
    return f"{numbers} of {baseline}" if share.high < 1 else f"worse, {numbers} of {baseline}"


def compact(parameters: Mapping[str, Any]) -> str:
    """Parameters in one line, three digits each."""
    return " ".join(f"{name}={_short(value)}" for name, value in parameters.items())


def nats(value: float) -> str:
    """A KL: three decimals, or two digits where those would say nothing."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def percent(share: float) -> str:
    """A share of 1: one decimal, but `100%` and `0%` where it is just that."""
    return f"{100 * share:.0f}%" if share in (0, 1) else f"{100 * share:.1f}%"


def whole_percent(share: float) -> str:
    """A share of 1 without decimals."""
    return f"{100 * share:.0f}%"


def interval(estimate: Estimate, spelled: Callable[[float], str], between: str = "-") -> str:
    """Both ends of an interval, with one percent sign."""
    return f"{spelled(estimate.low).removesuffix('%')}{between}{spelled(estimate.high)}"


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _own_parameters(policy: StepPolicy) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]
        value = getattr(policy, field.name)
        if isinstance(value, StepPolicy):
            parameters |= _own_parameters(value)
        elif value != field.default:
            parameters[field.name] = "per unit" if isinstance(value, tuple) else value
    return parameters
