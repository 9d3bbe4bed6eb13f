"""The words asked for are the common ones of the list, and the counts are RULER's."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


def listed(text: str) -> list[str]:
    """The words of a numbered list, whose numbers must be 1, 2, 3 and so on."""
    entries = re.findall(r"(\d+)\. (\w+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return [word for _, word in entries]


@pytest.mark.parametrize(
    ("context_tokens", "common", "rare", "example_common", "example_rare"),
    [(800, 6, 1, 3, 1), (4095, 6, 1, 3, 1), (4096, 30, 3, 10, 3), (12000, 30, 3, 10, 3)],
)
def test_words_appear_as_often_as_in_ruler(
    made: Made, texts: Texts, context_tokens: int, common: int, rare: int, example_common: int, example_rare: int
) -> None:
    question, answer = texts(made("common_words", context_tokens=context_tokens))
    _, example, asked = (part.split("\nQuestion")[0] for part in question.split("appear most often.\n"))
    solution = question.split("in the list are:")[1].split("\n")[0]
    for text, reference, counts in [
        (asked, answer, (common, rare)),
        (example, solution, (example_common, example_rare)),
    ]:
        found = Counter(listed(text))
        assert {word for word, count in found.items() if count == counts[0]} == set(listed(reference))
        assert set(found.values()) == set(counts)
        assert len(listed(reference)) == 10


def test_no_word_of_the_example_is_in_the_list(made: Made, texts: Texts) -> None:
    question, _ = texts(made("common_words"))
    _, example, asked = (part.split("\nQuestion")[0] for part in question.split("appear most often.\n"))
    assert not set(listed(example)) & set(listed(asked))


def test_common_words_are_scattered(made: Made, texts: Texts) -> None:
    question, answer = texts(made("common_words", context_tokens=3000))
    words = listed(question.rsplit("appear most often.\n", 1)[1].split("\nQuestion")[0])
    is_common = [word in listed(answer) for word in words]
    # 15 of 60 in each quarter, were they spread evenly.
    for start in range(0, len(words), len(words) // 4)[:4]:
        assert 5 < sum(is_common[start : start + len(words) // 4]) < 30


def test_more_tokens_than_there_are_words_for_are_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"has 18\d\d words, too few for .* ask for fewer than (\d+)$") as caught:
        made("common_words", context_tokens=100_000)
    n_most = int(str(caught.value).split()[-1]) - 1
    assert made("common_words", context_tokens=n_most).prompt.n_prompt_tokens > 0.95 * n_most
