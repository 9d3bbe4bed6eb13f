"""How answers are scored: leniently, and by what they say, not how.

After RULER's string match (arXiv 2404.06654): the share of what was expected that occurs. Unlike there,
a string must stand by itself, so that "able" is not found in "table" nor a number in a longer one.
"""

import re
from collections.abc import Sequence


def strings_found(answer: str, *, expected: Sequence[str]) -> float:
    """Share of the strings `expected` that occur in `answer` as whole words, whatever the case."""
    return sum(_occurs(string, answer) for string in expected) / len(expected)


def first_word(answer: str, *, expected: str) -> float:
    """1 if the first word of `answer` is `expected`, whatever the case, else 0."""
    words = re.findall(r"\w+", answer)
    return float(bool(words) and words[0].lower() == expected.lower())


def lines_found(answer: str, *, expected: Sequence[str]) -> float:
    """Share of the lines `expected` that are lines of `answer`, whatever the spaces around them."""
    lines = {line.strip() for line in answer.splitlines()}
    return sum(line.strip() in lines for line in expected) / len(expected)


def words_in_order(answer: str, *, reference: str) -> float:
    """Share of the words of `reference` that `answer` has in the same order.

    The longest common subsequence of both, over the words of `reference`. Words are what stands between
    spaces. An answer of more words is cut to as many as the reference has, so that going on earns nothing.
    A reference without a word, such as a lone line end, misses nothing in any answer: 1.
    """
    expected = reference.split()
    if not expected:
        return 1.0
    # Row by row of the usual table: `longest[j]` is the subsequence shared with the first j words of the answer.
    words = answer.split()[: len(expected)]
    longest = [0] * (len(words) + 1)
    for word in expected:
        before = longest
        longest = [0]
        for j, candidate in enumerate(words):
            longest.append(before[j] + 1 if candidate == word else max(before[j + 1], longest[j]))
    return longest[-1] / len(expected)


def _occurs(string: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(string)}(?!\w)", text, re.IGNORECASE) is not None
