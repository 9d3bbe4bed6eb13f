"""Scores are shares, of what was expected, in [0, 1]."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycler.tasks.scores import first_word, lines_found, strings_found, words_in_order

WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("7, 8, and Able.", 1),
        ("able 8", 2 / 3),
        ("tables 78", 0),
        ("able able able", 1 / 3),
        ("ABLE-7:8", 1),
    ],
)
def test_strings_are_found_as_whole_words_whatever_the_case(answer: str, share: float) -> None:
    assert strings_found(answer, expected=["7", "8", "able"]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "score"), [("red", 1), (" **Red**!", 1), ("reddish", 0), ("the red", 0), ("", 0), ("!", 0)]
)
def test_first_word_is_compared_alone(answer: str, score: float) -> None:
    assert first_word(answer, expected="red") == score


def test_lines_are_found_whole() -> None:
    answer = "a: 1\n  b: 2 \nc: 33"
    assert lines_found(answer, expected=["a: 1\n", "b: 2\n", "c: 3\n", "d: 4\n"]) == 0.5


@given(WORDS, WORDS)
def test_words_in_order_are_the_longest_common_subsequence(answer: list[str], reference: list[str]) -> None:
    cut = answer[: len(reference)]

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(cut) or j == len(reference):
            return 0
        if cut[i] == reference[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    score = words_in_order(" ".join(answer), reference=" ".join(reference))
    assert score == longest(0, 0) / len(reference)


@given(WORDS, WORDS)
def test_going_on_earns_nothing(reference: list[str], more: list[str]) -> None:
    wrong = ["x"] * len(reference)
    assert words_in_order(" ".join(wrong + reference + more), reference=" ".join(reference)) == 0
    assert words_in_order(" ".join(reference + more), reference=" ".join(reference)) == 1


def test_reference_without_words_misses_nothing() -> None:
    assert words_in_order("", reference="\n") == words_in_order("a", reference="\n") == 1
