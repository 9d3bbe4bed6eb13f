from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies import AlwaysFull, FixedStride
from tuning.confirm.winners import choose_winners
from tuning.search.study import Candidate, Search


@dataclass
class Run:
    """The KL of a closed-loop run of five candidates over two steps."""

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray


def search(family: str, n_candidates: int) -> Search:
    candidates = [Candidate({"number": n}, FixedStride(n + 1), 0.1 * n) for n in range(n_candidates)]
    return Search(family, tuple(candidates), np.zeros((3, 2)))


def run(kl: list[list[float]]) -> Run:
    return Run(np.array(kl), np.zeros((5, 2)), np.zeros((5, 2)), np.zeros((5, 2, 1, 1)))


def test_of_each_family_the_candidate_with_the_least_kl_over_all_prompts_wins() -> None:
    runs = [
        run([[0.1, 0.3], [0.3, 0.5], [0.0, 0.0], [0.2, 0.4], [1.0, 1.0]]),
        run([[0.9, 0.9], [0.1, 0.1], [0.2, 0.2], [0.2, 0.2], [0.0, 0.0]]),
    ]
    one, other = choose_winners([search("one", 2), search("other", 3)], runs)
    assert (one.search.family, one.candidate.parameters) == ("one", {"number": 1})
    np.testing.assert_allclose(one.tune_kl, (0.4 + 0.1) / 2)
    assert (other.search.family, other.candidate.parameters) == ("other", {"number": 0})
    np.testing.assert_allclose(other.tune_kl, 0.1)


def test_of_equals_the_one_that_was_best_in_replay_wins() -> None:
    (winner,) = choose_winners([search("one", 5)], [run([[0.5, 0.5], [0.1, 0.1], [0.1, 0.1], [0.2, 0.2], [0.1, 0.1]])])
    assert winner.candidate.parameters == {"number": 1}
    assert winner.candidate.policy == FixedStride(2) != AlwaysFull()
