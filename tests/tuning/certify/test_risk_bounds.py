from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tuning.certify.risk_bounds import conformal_risk, fewest_prompts, mean_upper_bound, share_upper_bound

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

some = settings(max_examples=80, deadline=None)

losses = st.lists(st.floats(0, 1.5), min_size=1, max_size=30).map(np.array)
probabilities = st.floats(0, 1)
confidences = st.sampled_from([0.75, 0.9, 0.95, 0.99])

# Draws of losses, and the mean of what counts up to a cap of 1.
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "rarely all": (lambda rng, size: rng.binomial(1, 0.1, size).astype(float), 0.1),
    "nearly always all": (lambda rng, size: rng.binomial(1, 0.97, size).astype(float), 0.97),
    "uniform": (lambda rng, size: rng.uniform(0, 1, size), 0.5),
    "little": (lambda rng, size: rng.beta(2, 14, size), 0.125),
    "beyond the cap": (lambda rng, size: rng.exponential(0.5, size), 0.5 * (1 - math.exp(-2))),
    "always the same": (lambda rng, size: np.full(size, 0.25), 0.25),
    "nothing or 0.4": (lambda rng, size: 0.4 * rng.binomial(1, 0.5, size), 0.2),
}


@pytest.mark.parametrize("confidence", [0.75, 0.9])
@pytest.mark.parametrize("n_prompts", [1, 6, 30])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_mean_is_above_its_bound_in_no_more_draws_than_the_confidence_allows(
    name: str, n_prompts: int, confidence: float
) -> None:
    draw, mean = DISTRIBUTIONS[name]
    n_draws = 300
    values = draw(np.random.default_rng(7), (n_draws, n_prompts))
    n_missed = sum(mean_upper_bound(row, 1, confidence) < mean for row in values)
    assert n_missed <= binom.ppf(0.999, n_draws, 1 - confidence)


@lru_cache
def bounds_of_counts(n_prompts: int, confidence: float) -> np.ndarray:
    """Bound by the number of prompts that lose 1, where the others lose nothing."""
    return np.array(
        [mean_upper_bound((np.arange(n_prompts) < n).astype(float), 1, confidence) for n in range(n_prompts + 1)]
    )


def counts(chances: list[float]) -> np.ndarray:
    """Exact probabilities of how many of independent events happen."""
    pmf = np.ones(1)
    for chance in chances:
        pmf = np.convolve(pmf, [1 - chance, chance])
    return pmf


@some
@given(st.lists(probabilities, min_size=1, max_size=12), confidences)
def test_the_mean_over_unlike_prompts_is_covered_exactly(chances: list[float], confidence: float) -> None:
    missed = bounds_of_counts(len(chances), confidence) < np.mean(chances) - 1e-9
    assert counts(chances)[missed].sum() <= 1 - confidence + 1e-9


@some
@given(probabilities, st.integers(1, 40), confidences)
def test_the_mean_of_like_prompts_is_covered_exactly(chance: float, n_prompts: int, confidence: float) -> None:
    missed = bounds_of_counts(n_prompts, confidence) < chance - 1e-9
    assert counts([chance] * n_prompts)[missed].sum() <= 1 - confidence + 1e-9


def test_prompts_sorted_by_kind_are_covered() -> None:
    # Here bets that follow the prompts seen so far miss the mean in every draw.
    sorted_by_kind = np.repeat([0.0, 1.0], [20, 10])
    assert mean_upper_bound(sorted_by_kind, 1, 0.9) > 1 / 3


def test_one_prompt_that_loses_nothing_says_little() -> None:
    m = mean_upper_bound(np.zeros(1), 1, 0.9)
    # The mean stake is that of the highest and the careful one, and a stake of s makes 1 + s m of 1.
    assert 1 + m * (1 / (1 - m) + math.sqrt(8 * math.log(10))) / 2 == pytest.approx(10)
    assert m == pytest.approx(0.9333, abs=1e-4)
    assert mean_upper_bound(np.zeros(1), 0.4, 0.9) == pytest.approx(0.4 * m)


@pytest.mark.parametrize("n_prompts", [4, 9, 12])
def test_few_prompts_that_lose_nothing_are_bounded_by_betting_all(n_prompts: int) -> None:
    assert mean_upper_bound(np.zeros(n_prompts), 1, 0.9) == pytest.approx(1 - 0.1 ** (1 / n_prompts))


def test_at_the_bound_the_capital_is_what_was_wanted() -> None:
    values = np.tile([0.05, 0.1, 0.3, 1.0, 0.0, 0.2, 7.0], 6)
    m = mean_upper_bound(values, 1, 0.95)
    highest, careful = 1 / (1 - m), math.sqrt(8 * math.log(20) / 42)
    assert careful < highest
    stakes = np.array([[highest], [(highest + careful) / 2], [careful]])
    assert np.prod(1 - stakes * (np.minimum(values, 1) - m), axis=1).mean() == pytest.approx(20)


@pytest.mark.parametrize("n_prompts", [1, 2, 12, 500])
def test_where_every_prompt_reaches_the_cap_so_does_the_bound(n_prompts: int) -> None:
    for value in (0.4, 0.5, math.inf):
        assert mean_upper_bound(np.full(n_prompts, value), 0.4, 0.9) == 0.4


@some
@given(losses, confidences)
def test_the_bound_is_above_the_mean_within_the_cap_and_blind_to_order(values: np.ndarray, confidence: float) -> None:
    bound = mean_upper_bound(values, 1, confidence)
    assert np.minimum(values, 1).mean() <= bound <= 1
    assert bound > 0
    shuffled = np.random.default_rng(0).permutation(values)
    assert mean_upper_bound(shuffled, 1, confidence) == pytest.approx(bound, rel=1e-9)
    assert mean_upper_bound(3 * values, 3, confidence) == pytest.approx(3 * bound, rel=1e-9)


@some
@given(losses, st.data())
def test_the_bound_rises_with_losses_and_confidence(values: np.ndarray, data: st.DataObject) -> None:
    bound = mean_upper_bound(values, 1, 0.9)
    assert mean_upper_bound(values, 1, 0.95) >= bound - 1e-12
    worse = values.copy()
    worse[data.draw(st.integers(0, len(values) - 1))] += data.draw(st.floats(0, 1))
    assert mean_upper_bound(worse, 1, 0.9) >= bound - 1e-12
    assert mean_upper_bound(np.tile(values, 2), 1, 0.9) <= bound + 1e-12


@pytest.mark.parametrize("n_prompts", [20, 100, 1_000, 10_000])
def test_where_losses_vary_most_the_bound_is_a_quarter_wider_than_hoeffding_s(n_prompts: int) -> None:
    hoeffding = math.sqrt(math.log(10) / (2 * n_prompts))
    assert 0.5 < mean_upper_bound(np.arange(n_prompts) % 2, 1, 0.9) < 0.5 + 1.25 * hoeffding


@pytest.mark.parametrize("n_prompts", [20, 100, 1_000])
def test_where_losses_do_not_vary_the_bound_is_much_closer_than_hoeffding_s(n_prompts: int) -> None:
    hoeffding = math.sqrt(math.log(10) / (2 * n_prompts))
    assert mean_upper_bound(np.full(n_prompts, 0.1), 1, 0.9) < 0.1 + 0.5 * hoeffding


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [0.1, -1e-9]])
@pytest.mark.parametrize("bound", [lambda v: mean_upper_bound(v, 1, 0.9), lambda v: conformal_risk(v, 1)])
def test_what_is_no_loss_bounds_nothing(bound: Callable[[np.ndarray], float], values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no prompt|at least 0, not"):
        bound(np.array(values))


@pytest.mark.parametrize("n_prompts", [1, 2, 12, 30])
@pytest.mark.parametrize("confidence", [0.75, 0.9, 0.99])
def test_the_share_s_bound_is_that_of_clopper_and_pearson(n_prompts: int, confidence: float) -> None:
    assert share_upper_bound(0, n_prompts, confidence) == pytest.approx(1 - (1 - confidence) ** (1 / n_prompts))
    assert share_upper_bound(n_prompts - 1, n_prompts, confidence) == pytest.approx(confidence ** (1 / n_prompts))
    assert share_upper_bound(n_prompts, n_prompts, confidence) == 1
    for n in range(n_prompts):
        # The share at which so few would be seen no more often than the confidence allows.
        share = share_upper_bound(n, n_prompts, confidence)
        assert binom.cdf(n, n_prompts, share) == pytest.approx(1 - confidence)


@some
@given(st.lists(probabilities, min_size=2, max_size=12), confidences)
def test_the_share_among_unlike_prompts_is_covered_while_two_do_not_exceed(
    chances: list[float], confidence: float
) -> None:
    n_prompts = len(chances)
    bounds = np.array([share_upper_bound(n, n_prompts, confidence) for n in range(n_prompts - 1)] + [1, 1])
    assert counts(chances)[bounds < np.mean(chances) - 1e-9].sum() <= 1 - confidence + 1e-9


@pytest.mark.parametrize(("n_exceeding", "n_prompts"), [(-1, 3), (4, 3), (0, 0)])
def test_more_prompts_than_there_are_cannot_exceed(n_exceeding: int, n_prompts: int) -> None:
    with pytest.raises(ValueError, match=f"{n_exceeding} of {n_prompts} prompts is no share"):
        share_upper_bound(n_exceeding, n_prompts, 0.9)


def test_the_conformal_risk_counts_the_next_prompt_as_the_worst() -> None:
    assert conformal_risk(np.array([0, 0, 0.3]), 0.4) == pytest.approx((0.3 + 0.4) / 4)
    assert conformal_risk(np.array([5.0]), 0.4) == pytest.approx(0.4)
    assert conformal_risk(np.zeros(9), 1) == pytest.approx(0.1)


@some
@given(losses, st.sampled_from([0.64, 0.75, 0.9, 0.99]))
def test_the_conformal_risk_is_no_more_than_the_bound(values: np.ndarray, confidence: float) -> None:
    assert conformal_risk(values, 1) <= mean_upper_bound(values, 1, confidence) * (1 + 1e-12)


@st.composite
def monotone_losses(draw: st.DrawFn) -> np.ndarray:
    """`(prompts, policies)`: what each prompt loses under policies from expensive to cheap."""
    n_prompts, n_policies = draw(st.integers(2, 12)), draw(st.integers(1, 5))
    steps = draw(st.lists(st.floats(0, 0.3), min_size=n_prompts * n_policies, max_size=n_prompts * n_policies))
    return np.array(steps).reshape(n_prompts, n_policies).cumsum(1)


@some
@given(monotone_losses(), st.floats(0.05, 0.9), st.sampled_from([conformal_risk, mean_upper_bound]))
def test_the_prompt_left_out_loses_no_more_than_the_limit_on_average(
    losses: np.ndarray, limit: float, bound: Callable[..., float]
) -> None:
    arguments = (1.0, 0.9) if bound is mean_upper_bound else (1.0,)
    lost = []
    for left_out in range(len(losses)):
        others = np.delete(losses, left_out, 0)
        within = [bound(others[:, policy], *arguments) <= limit for policy in range(others.shape[1])]
        n_kept = len(list(itertools.takewhile(bool, within)))
        # Above the first policy is full attention, which loses nothing.
        lost.append(min(losses[left_out, n_kept - 1], 1.0) if n_kept else 0.0)
    assert np.mean(lost) <= limit + 1e-12


@some
@given(st.floats(0.02, 0.98), confidences)
def test_the_fewest_prompts_are_the_first_that_could_do(limit: float, confidence: float) -> None:
    fewest = fewest_prompts(limit, 1, confidence)
    assert fewest is not None
    assert mean_upper_bound(np.zeros(fewest), 1, confidence) <= limit + 1e-12
    if fewest > 1:
        assert mean_upper_bound(np.zeros(fewest - 1), 1, confidence) > limit - 1e-12


@pytest.mark.parametrize(("confidence", "fewest"), [(0.9, 9), (0.95, 11), (0.99, 17)])
def test_at_a_cap_of_four_limits_it_takes_nine_prompts_for_90_percent(confidence: float, fewest: int) -> None:
    assert fewest_prompts(0.1, 0.4, confidence) == fewest
    assert mean_upper_bound(np.zeros(fewest), 0.4, confidence) <= 0.1
    assert mean_upper_bound(np.zeros(fewest - 1), 0.4, confidence) > 0.1


@some
@given(losses, st.floats(0.1, 0.9))
def test_the_fewest_prompts_like_some_are_as_many_copies(values: np.ndarray, limit: float) -> None:
    fewest = fewest_prompts(limit, 1, 0.9, values)
    if fewest is None:
        assert np.minimum(values, 1).mean() > limit - 1e-4
        assert mean_upper_bound(np.tile(values, 20), 1, 0.9) > limit
    else:
        assert fewest >= (fewest_prompts(limit, 1, 0.9) or 0)
        copies = -(-fewest // len(values))
        if copies < 1000:
            assert mean_upper_bound(np.tile(values, copies), 1, 0.9) <= limit + 1e-12
