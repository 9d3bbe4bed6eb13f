from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from tuning.certify import certificate
from tuning.certify.certificate import KlLimit, certify
from tuning.certify.ladder import Ladder, fixed_sequence, ladder_budgets
from tuning.certify.risk_bounds import mean_upper_bound, share_upper_bound

ASKED = KlLimit(0.1, 0.4, 0.9)
N_PROMPTS = 30


def ladder_of(*kl: float | np.ndarray) -> Ladder:
    """Policies at falling budgets, with these KLs on every prompt."""
    budgets = [0.5 / 2**number for number in range(len(kl))]
    labels = [f"policy {number}" for number in range(len(kl))]
    return fixed_sequence(ASKED, budgets, labels, [np.broadcast_to(value, N_PROMPTS) for value in kl])


@pytest.mark.parametrize(
    ("most", "budgets"),
    [
        (1, (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)),
        (0.25, (0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)),
        (0.1, (0.1, 0.07, 0.05, 0.03, 0.02)),
        (0.1001, (0.1001, 0.07, 0.05, 0.03, 0.02)),
        (0.9, (0.9, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)),
        (0.02, (0.02,)),
        (0.004, (0.004,)),
    ],
)
def test_budgets_fall_from_the_most_that_may_be_spent(most: float, budgets: tuple[float, ...]) -> None:
    assert ladder_budgets(most) == budgets


def test_the_cheapest_policy_before_the_first_that_fails_is_chosen() -> None:
    ladder = ladder_of(0.01, 0.03, 0.05, 0.2, 0.3)
    assert [rung.certificate.certified for rung in ladder.rungs] == [True, True, True, False, False]
    assert ladder.chosen is ladder.rungs[2]
    assert ladder.asked == ASKED


def test_what_is_cheaper_than_a_failure_is_not_certified_however_good_it_is() -> None:
    ladder = ladder_of(0.01, 0.2, 0.01)
    assert ladder.rungs[2].certificate.kl_bound == ladder.rungs[0].certificate.kl_bound < ASKED.nats
    assert [rung.certificate.certified for rung in ladder.rungs] == [True, False, False]
    assert ladder.chosen is ladder.rungs[0]


def test_every_rung_holds_what_its_prompts_say() -> None:
    rng = np.random.default_rng(0)
    kl = [rng.exponential(0.02, N_PROMPTS), rng.exponential(0.2, N_PROMPTS)]
    ladder = ladder_of(*kl)
    for rung, values in zip(ladder.rungs, kl, strict=True):
        np.testing.assert_array_equal(rung.prompt_kl, values)
        assert replace(certify(values, ASKED, n_policies=2), certified=rung.certificate.certified) == rung.certificate


def test_a_ladder_that_certifies_nothing_says_how_many_prompts_would_do() -> None:
    ladder = ladder_of(0.08, 0.2)
    assert ladder.chosen is None
    refusal = ladder.refusal(6)
    bound = ladder.rungs[0].certificate.kl_bound
    assert refusal.startswith(
        "no policy below full attention certifies a KL of at most 0.1 nats per step, prompts counted up to 0.4, at 90% "
        f"confidence: of policy 0, the most expensive, the bound is {bound:.3g} on 30 prompts; "
    )
    n_prompts = int(refusal.split("; ")[1].split()[0])
    assert mean_upper_bound(np.full(n_prompts, 0.08), 0.4, 0.9) <= 0.1
    assert mean_upper_bound(np.full(n_prompts - 1, 0.08), 0.4, 0.9) > 0.1
    assert refusal.endswith(f"enough, half of all that are recorded (--per-kind {2 * -(-n_prompts // 6)}).")


def test_what_no_number_of_prompts_could_certify_is_said() -> None:
    assert ladder_of(0.11).refusal(6).endswith("; no number of prompts that lose as these do would be enough.")


def test_a_ladder_out_of_order_is_refused() -> None:
    good, bad = ladder_of(0.01, 0.3).rungs
    with pytest.raises(ValueError, match=r"budgets must fall from rung to rung: 0.5 follows 0.25"):
        Ladder((bad, good))
    with pytest.raises(ValueError, match="policy 0 cannot be certified where policy 1 is not"):
        Ladder((replace(bad, budget=0.9), good))
    with pytest.raises(ValueError, match="at least one rung"):
        Ladder(())


def once_for_equal_arguments(bound: Callable[..., float]) -> Callable[..., float]:
    """A bound does not depend on the order of its values."""
    known: dict[tuple[Any, ...], float] = {}

    def remembered(values: Any, *rest: Any) -> float:
        asked = (tuple(np.sort(np.atleast_1d(values))), *rest)
        if asked not in known:
            known[asked] = bound(values, *rest)
        return known[asked]

    return remembered


# Of each policy, that a prompt loses all that counts, 0.4, instead of nothing.
CHANCES = {
    "all just above the limit": np.full(6, 0.26),
    "rising past the limit": np.array([0.1, 0.2, 0.26, 0.3, 0.4, 0.6]),
    "falling below it again": np.array([0.26, 0.2, 0.26, 0.1, 0.26, 0.05]),
}


@pytest.mark.parametrize("together", [False, True], ids=["independent policies", "the same prompts are bad for all"])
@pytest.mark.parametrize("name", CHANCES)
def test_any_certificate_of_a_ladder_is_wrong_in_no_more_draws_than_the_confidence_allows(
    name: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a prompt loses is all or nothing, so few sets of values come again and again.
    for bound in (mean_upper_bound, share_upper_bound):
        monkeypatch.setattr(certificate, bound.__name__, once_for_equal_arguments(bound))
    chances, n_draws, n_prompts = CHANCES[name], 250, 10
    rng = np.random.default_rng(11)
    budgets = np.linspace(0.5, 0.1, len(chances)).tolist()
    labels = [str(budget) for budget in budgets]
    above_limit = 0.4 * chances > ASKED.nats
    n_wrong = n_wrong_alone = n_wrong_shares = 0
    for _ in range(n_draws):
        drawn = rng.uniform(size=n_prompts if together else (len(chances), n_prompts))
        kl = 0.4 * (drawn < chances[:, None])
        found = [rung.certificate for rung in fixed_sequence(ASKED, budgets, labels, list(kl)).rungs]
        n_wrong += any(one.certified for one, wrong in zip(found, above_limit, strict=True) if wrong)
        n_wrong_alone += any(one.kl_bound <= ASKED.nats for one, wrong in zip(found, above_limit, strict=True) if wrong)
        n_wrong_shares += any(one.share_bound < chance for one, chance in zip(found, chances, strict=True))
    allowed = binom.ppf(0.999, n_draws, 1 - ASKED.confidence)
    assert n_wrong <= allowed
    assert n_wrong_shares <= allowed
    # Tested each by itself, six policies just above the limit are passed too often.
    assert n_wrong_alone > allowed or together or name != "all just above the limit"
