"""A ladder of budgets: the cheapest policy that certifies a limit, found by testing from the most expensive down."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tuning.certify.certificate import Certificate, KlLimit, certify, held_out_by
from tuning.certify.risk_bounds import fewest_prompts

_BUDGETS = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)


def ladder_budgets(most: float) -> tuple[float, ...]:
    """Budgets to try, falling, none above `most`, which is one of them unless it is 1.

    Full attention, at a budget of 1, is the top of every ladder: it loses nothing, needs no test and saves nothing.

    Args:
        most: Budget that may be spent, in (0, 1].
    """
    # Within a hundredth two budgets are the same one.
    below = [budget for budget in _BUDGETS if budget < 0.99 * most]
    return (*below,) if most == 1 else (most, *below)


@dataclass(frozen=True)
class Rung:
    """A policy on the ladder.

    Attributes:
        budget: Share of unit-steps that may run full.
        label: What tables and pictures call the policy.
        prompt_kl: float64 `(prompts,)`: its KL on each held-out prompt, nats per step.
        certificate: What they say about it.
    """

    budget: float
    label: str
    prompt_kl: np.ndarray
    certificate: Certificate


@dataclass(frozen=True)
class Ladder:
    """Policies from expensive to cheap, tested in this order until one does not certify the limit.

    That is fixed-sequence testing, as in Learn then Test (arXiv 2110.01052). The order is fixed before anything is
    measured. So a wrong certificate is given only where the first policy in the order that does not keep the limit
    gets one, and its bound is wrong with a probability of at most 1 - confidence. Whatever the number of policies, all
    certificates are right at that confidence, and the cheapest of them may be chosen for being cheap.

    Attributes:
        rungs: Budgets falling; those that are certified come first.
    """

    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        if not self.rungs:
            raise ValueError("a ladder has at least one rung.")
        for above, below in itertools.pairwise(self.rungs):
            if below.budget >= above.budget:
                raise ValueError(f"budgets must fall from rung to rung: {below.budget:g} follows {above.budget:g}.")
            if below.certificate.certified and not above.certificate.certified:
                raise ValueError(f"{below.label} cannot be certified where {above.label} is not.")

    @property
    def asked(self) -> KlLimit:
        """What was to be certified."""
        return self.rungs[0].certificate.asked

    @property
    def chosen(self) -> Rung | None:
        """The cheapest policy that is certified; None if none is."""
        certified = [rung for rung in self.rungs if rung.certificate.certified]
        return certified[-1] if certified else None

    def refusal(self, n_kinds: int) -> str:
        """Why no policy was chosen, in one sentence, and how many prompts would have done.

        Args:
            n_kinds: Kinds of text among the prompts.
        """
        asked, top = self.asked, self.rungs[0]
        fewest = fewest_prompts(asked.nats, asked.cap, asked.confidence, top.prompt_kl)
        way_out = (
            "no number of prompts that lose as these do would be enough"
            if fewest is None
            else f"{fewest} that lose as these do would be enough, {held_out_by(fewest, n_kinds)}"
        )
        return (
            f"no policy below full attention certifies {asked}: of {top.label}, the most expensive, the bound is "
            f"{top.certificate.kl_bound:.3g} on {top.certificate.n_prompts} prompts; {way_out}."
        )


def fixed_sequence(
    asked: KlLimit, budgets: Sequence[float], labels: Sequence[str], prompt_kl: Sequence[np.ndarray]
) -> Ladder:
    """Test policies in the order given until one does not certify the limit.

    Args:
        asked: What to certify; chosen before the KLs were seen, like the order.
        budgets: Of each policy, falling.
        labels: One per policy.
        prompt_kl: One per policy: float64 `(prompts,)`, nats per step, over the same held-out prompts.
    """
    rungs: list[Rung] = []
    for budget, label, kl in zip(budgets, labels, prompt_kl, strict=True):
        alone = certify(kl, asked, n_policies=len(budgets))
        certified = alone.certified and all(rung.certificate.certified for rung in rungs)
        rungs.append(Rung(budget, label, kl, replace(alone, certified=certified)))
    return Ladder(tuple(rungs))
