"""A long text of made-up words: which three appear most often?

RULER (arXiv 2404.06654), frequent words extraction: six random letters a word, the frequency of the k-th
proportional to 1 / k squared, and dots in place of the first. Deviation: the words of
each prompt are drawn anew, as many as appear.
"""

import random
import string
from functools import partial

from recycler.prompts.request import PromptRequest
from recycler.tasks.filling import longest_fitting
from recycler.tasks.scores import strings_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

_N_ASKED = 3
_WORD_LETTERS = 6
_DOTS = "..."
_ALPHA = 2.0
# The sum of 1 / k ** 2 over all k.
_ZETA = 1.6449340668482264
# So many entries give the fourth word 3 appearances and the fifth 2; from there on they never tie.
_LEAST_ENTRIES = 95

_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    word_seed, order_seed = rng.random(), rng.random()

    def words(n_entries: int) -> list[str]:
        # Drawn anew from their seed: the first words are the same, however many are drawn.
        return _words(_n_ranks(n_entries), random.Random(word_seed))

    def text(n_entries: int) -> list[int]:
        entries = [word for rank, word in enumerate(words(n_entries), 1) for _ in range(_frequency(rank, n_entries))]
        random.Random(order_seed).shuffle(entries)
        return request.encode("".join(f" {entry}" for entry in entries))

    opening, question = request.encode(_OPENING), request.encode(_QUESTION)
    n_room = room_left(request, len(opening) + len(question), len(text(_LEAST_ENTRIES)))
    n_entries = longest_fitting(text, _LEAST_ENTRIES, n_room)
    expected = words(n_entries)[1 : 1 + _N_ASKED]
    return answered(
        request,
        [*opening, *text(n_entries), *question],
        request.encode(f" {', '.join(expected[:-1])}, and {expected[-1]}."),
        partial(strings_found, expected=expected),
    )


def _frequency(rank: int, n_entries: int) -> int:
    """How often the word of this rank, from 1 on, appears among about `n_entries`."""
    return int(n_entries * rank**-_ALPHA / _ZETA)


def _n_ranks(n_entries: int) -> int:
    """How many words appear at all."""
    return int((n_entries / _ZETA) ** (1 / _ALPHA))


def _words(n_words: int, rng: random.Random) -> list[str]:
    """The dots and then distinct words of small letters, `n_words` in all."""
    words = {_DOTS: None}
    while len(words) < n_words:
        words["".join(rng.choices(string.ascii_lowercase, k=_WORD_LETTERS))] = None
    return list(words)


FREQUENT_WORDS = Task("frequent_words", "RULER (arXiv 2404.06654)", 0.0, _make)
