"""A long numbered list of words: which ten appear most often?

RULER (arXiv 2404.06654), common words extraction, with its counts: 30 times against 3, after a solved
example of 40 words with 10 against 3; in contexts below 4,096 tokens 6 against 1, after an example of 20
words with 3 against 1. Deviations: words are out of Python's documentation, 1,866 of them with Python
3.11, which fill up to about 40,000 tokens; no word of the example is in the list.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import key_words
from recycler.tasks.filling import longest_fitting
from recycler.tasks.scores import strings_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

_N_COMMON = 10


@dataclass(frozen=True)
class _Counts:
    """How often the words of a list appear in it: the common ones and the others."""

    common: int
    rare: int


_SHORT_CONTEXT = 4096
_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_QUESTION = (
    f"\nQuestion: What are the {_N_COMMON} most common words in the above list? "
    f"Answer: The top {_N_COMMON} words that appear most often in the list are:"
)


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    is_short = request.context_tokens < _SHORT_CONTEXT
    n_example_words = 20 if is_short else 40
    example_counts = _Counts(3, 1) if is_short else _Counts(10, 3)
    counts = _Counts(6, 1) if is_short else _Counts(30, 3)

    words = key_words()
    rng.shuffle(words)
    # The example has words of its own: a common word there says nothing of the list.
    example_words, words = words[:n_example_words], words[n_example_words:]
    solved = f"{_list(example_words, example_counts, rng)}{_QUESTION}{_numbered(example_words[:_N_COMMON])}"
    opening, question = request.encode(f"{_OPENING}{solved}\n{_OPENING}"), request.encode(_QUESTION)
    order_seed = rng.random()

    def listing(n_words: int) -> list[int]:
        return request.encode(_list(words[:n_words], counts, random.Random(order_seed)))

    # One word at least that is not common, or nothing is asked.
    n_room = room_left(request, len(opening) + len(question), len(listing(_N_COMMON + 1)))
    n_most = len(listing(len(words)))
    if n_most <= n_room:
        raise ValueError(
            f"the task {request.kind} has {len(words)} words, too few for a context of {request.context_tokens} "
            f"tokens: ask for fewer than {request.context_tokens - n_room + n_most}"
        )
    n_words = longest_fitting(listing, _N_COMMON + 1, n_room)
    common = words[:_N_COMMON]
    return answered(
        request,
        [*opening, *listing(n_words), *question],
        request.encode(_numbered(common)),
        partial(strings_found, expected=common),
    )


def _list(words: Sequence[str], counts: _Counts, rng: random.Random) -> str:
    """The first words of `words` and the others, each as often as `counts` says, in a drawn order."""
    entries = [*words[:_N_COMMON]] * counts.common + [*words[_N_COMMON:]] * counts.rare
    rng.shuffle(entries)
    return _numbered(entries).lstrip()


def _numbered(words: Sequence[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, 1))


COMMON_WORDS = Task("common_words", "RULER (arXiv 2404.06654)", 0.0, _make)
