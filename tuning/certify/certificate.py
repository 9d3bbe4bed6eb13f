"""Certificates: what can be said for certain about a policy's KL on prompts that it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuning.certify.risk_bounds import conformal_risk, fewest_prompts, mean_upper_bound, share_upper_bound

# A higher cap counts bad prompts for more, and needs about as many times more prompts.
_CAP_IN_LIMITS = 4.0
_LEAST_CONFIDENCE = 0.75


@dataclass(frozen=True)
class KlLimit:
    """What is to be certified: that a prompt is expected to lose no more than so much.

    Attributes:
        nats: Most that KL to full attention, mean over the steps of a prompt, may be in expectation over prompts.
        cap: Nats up to which a prompt counts, above `nats`. KL has no upper bound, and nothing can be certified about
            the mean of what may be anything.
        confidence: Probability at which a certificate is right, in [0.75, 1): below, the bound on a share would not
            hold for prompts of several kinds.
    """

    nats: float
    cap: float
    confidence: float

    def __post_init__(self) -> None:
        if not 0 < self.nats < math.inf:
            raise ValueError(f"the limit of KL is a number of nats per step above 0, not {self.nats:g}.")
        if not self.nats < self.cap < math.inf:
            raise ValueError(
                f"prompts must count up to more nats than the limit: the cap is {self.cap:g}, the limit {self.nats:g}."
            )
        if not _LEAST_CONFIDENCE <= self.confidence < 1:
            raise ValueError(f"the confidence is a probability in [{_LEAST_CONFIDENCE}, 1), not {self.confidence:g}.")

    @classmethod
    def of(cls, nats: float, *, cap: float | None = None, confidence: float = 0.9) -> KlLimit:
        """A limit whose cap is four times the limit unless it is given."""
        return cls(nats, _CAP_IN_LIMITS * nats if cap is None else cap, confidence)

    def __str__(self) -> str:
        return (
            f"a KL of at most {self.nats:g} nats per step, prompts counted up to {self.cap:g}, "
            f"at {100 * self.confidence:g}% confidence"
        )


@dataclass(frozen=True)
class Certificate:
    """What prompts that nobody tuned on say about a policy, for prompts like them.

    Each statement holds at the confidence asked for, by itself.

    Attributes:
        asked: What was to be certified.
        n_prompts: Prompts measured.
        n_exceeding: Of these, how many had a KL above the limit.
        n_policies: Policies that could have been chosen.
        kl_bound: Upper bound of the expected KL of a prompt, each counted up to the cap, nats per step; of this policy
            taken alone. For the one that was chosen among several what holds is the limit.
        share_bound: Upper bound of the share of prompts whose KL exceeds the limit, in (0, 1]; it holds for all
            policies that could have been chosen at once (Bonferroni).
        conformal_risk: Bound in expectation, with no confidence, nats per step; see `risk_bounds.conformal_risk`.
        certified: Whether the limit is certified. Of several policies tested in order a cheaper one is not, whatever
            its bound, where a more expensive one is not.
    """

    asked: KlLimit
    n_prompts: int
    n_exceeding: int
    n_policies: int
    kl_bound: float
    share_bound: float
    conformal_risk: float
    certified: bool

    def __post_init__(self) -> None:
        if not 0 <= self.n_exceeding <= self.n_prompts or min(self.n_prompts, self.n_policies) < 1:
            raise ValueError(
                f"{self.n_exceeding} of {self.n_prompts} prompts and {self.n_policies} policies certify nothing."
            )
        for name, value, most in (
            ("KL bound", self.kl_bound, self.asked.cap),
            ("share bound", self.share_bound, 1.0),
            ("conformal risk", self.conformal_risk, self.asked.cap),
        ):
            # A rounding above the cap is still the cap.
            if not 0 < value <= most * (1 + 1e-12):
                raise ValueError(f"the {name} must be in (0, {most:g}], not {value:g}.")
        if self.certified and self.kl_bound > self.asked.nats:
            raise ValueError(f"a bound of {self.kl_bound:g} nats certifies no limit of {self.asked.nats:g}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values; what was asked is among them."""
        return {
            "max_kl": self.asked.nats,
            "cap": self.asked.cap,
            "confidence": self.asked.confidence,
            "n_prompts": self.n_prompts,
            "n_exceeding": self.n_exceeding,
            "n_policies": self.n_policies,
            "kl_bound": self.kl_bound,
            "share_bound": self.share_bound,
            "conformal_risk": self.conformal_risk,
            "certified": self.certified,
        }

    def __str__(self) -> str:
        asked = self.asked
        sure = f"with {100 * asked.confidence:g}% confidence each"
        counted = f"on average, each counted up to {asked.cap:g}"
        prompts = f"prompts like the {self.n_prompts} measured"
        # What is rounded down bounds nothing.
        share = f"at most {math.ceil(100 * self.share_bound - 1e-9)}% of them lose more than {asked.nats:g}"
        if self.certified:
            return f"{sure}, {prompts} lose at most {asked.nats:g} nats per step {counted}, and {share}"
        return (
            f"not certified: {sure}, {prompts} lose at most {self.kl_bound:.3g} nats per step {counted}, and {share}, "
            f"where {asked.nats:g} was asked for"
        )


def certify(kl: np.ndarray, asked: KlLimit, *, n_policies: int = 1) -> Certificate:
    """Test one policy, by its own numbers alone.

    Args:
        kl: `(prompts,)`: mean over steps of KL(full || policy) in closed loop, nats, on independent prompts that had
            no part in making the policy.
        asked: What to certify; chosen before the KLs were seen.
        n_policies: Policies that could have been chosen, this one included.

    Raises:
        ValueError: If there are no prompts, or a KL is no number.
    """
    n_prompts, n_exceeding = len(kl), int((kl > asked.nats).sum())
    bound = mean_upper_bound(kl, asked.cap, asked.confidence)
    return Certificate(
        asked=asked,
        n_prompts=n_prompts,
        n_exceeding=n_exceeding,
        n_policies=n_policies,
        kl_bound=bound,
        share_bound=share_upper_bound(n_exceeding, n_prompts, 1 - (1 - asked.confidence) / n_policies),
        conformal_risk=conformal_risk(kl, asked.cap),
        certified=bound <= asked.nats,
    )


def check_n_prompts(asked: KlLimit, n_prompts: int, n_kinds: int) -> None:
    """Refuse to measure prompts that are too few to certify anything, even if none loses anything.

    Args:
        asked: What is to be certified.
        n_prompts: Prompts held out.
        n_kinds: Kinds of text among all prompts; half of the prompts of a kind are held out.

    Raises:
        ValueError: With the number that it takes.
    """
    fewest = fewest_prompts(asked.nats, asked.cap, asked.confidence)
    if fewest is not None and n_prompts < fewest:
        raise ValueError(
            f"{n_prompts} held-out {'prompt' if n_prompts == 1 else 'prompts'} can never certify {asked}: "
            f"at least {fewest} are needed, {held_out_by(fewest, n_kinds)}."
        )


def held_out_by(n_prompts: int, n_kinds: int) -> str:
    """How to hold out at least so many prompts, as part of a sentence."""
    return f"half of all that are recorded (--per-kind {2 * math.ceil(n_prompts / n_kinds)})"
