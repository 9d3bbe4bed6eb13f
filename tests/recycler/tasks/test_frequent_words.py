"""The words asked for are the most frequent after the dots, without ties."""

import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycler.tasks import TaskPrompt
from recycler.tasks.frequent_words import _LEAST_ENTRIES, _frequency

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("context_tokens", [260, 1024, 6000])
def test_answer_is_the_three_most_frequent_words(made: Made, texts: Texts, context_tokens: int) -> None:
    question, answer = texts(made("frequent_words", context_tokens=context_tokens))
    text = question.split("frequently appeared coded words.")[1].split("\nQuestion")[0]
    (dots, n_dots), *ranked = Counter(text.split()).most_common()
    assert dots == "..."
    assert n_dots > sum(count for _, count in ranked)
    assert {word for word, _ in ranked[:3]} == set(re.findall(r"[a-z]{6}", answer))
    assert ranked[2][1] > ranked[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)


def test_frequencies_fall_with_the_square_of_the_rank(made: Made, texts: Texts) -> None:
    question, _ = texts(made("frequent_words", context_tokens=6000))
    counts = [count for _, count in Counter(question.split()).most_common(4)]
    assert [round(counts[0] / count, 1) for count in counts] == pytest.approx([1, 4, 9, 16], rel=0.05)


@given(st.integers(_LEAST_ENTRIES, 10**6))
def test_the_last_word_asked_for_never_ties_with_the_next(n_entries: int) -> None:
    # Rank 1 are the dots.
    assert _frequency(4, n_entries) > _frequency(5, n_entries)
