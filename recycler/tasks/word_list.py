"""Sixteen words, given early in a long text, to be written again at its end.

After the tasks with long outputs that Recycled Attention (arXiv 2411.05787) is measured on, in the form
of RULER's needles (arXiv 2404.06654): one needle that takes many steps to say. Deviations: the words are
drawn, and hidden in the first quarter of the essays, so that they are always far back.
"""

import re
from functools import partial

from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import key_words
from recycler.tasks.haystack import haystack, repeated_essays
from recycler.tasks.scores import words_in_order
from recycler.tasks.task import MARGIN_TOKENS, Task, TaskPrompt, answered, room_left

_N_WORDS = 16
_DEPTHS = (0.0, 0.25)
_OPENING = (
    f"A list of {_N_WORDS} special words is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the words afterwards.\n"
)
_QUESTION = (
    f"\nWhat are the {_N_WORDS} special words mentioned in the provided text, in the same order? "
    f"The list of {_N_WORDS} special words is:"
)


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    listed = f" {', '.join(rng.sample(key_words(), _N_WORDS))}."
    opening, question = request.encode(_OPENING), request.encode(_QUESTION)
    hidden = request.encode(f" The list of {_N_WORDS} special words is:{listed}")
    # Far back is beyond as much again as the list itself.
    n_room = room_left(request, len(opening) + len(question), 3 * len(hidden))
    answer = request.encode(listed)[: request.n_steps]
    return answered(
        request,
        [*opening, *haystack(request, [hidden], n_room, rng, _DEPTHS), *question],
        answer,
        partial(_listed_in_order, reference=str(request.tokenizer.decode(answer))),
        n_new_tokens=min(len(answer) + MARGIN_TOKENS, request.n_steps),
        corpus=request.texts(repeated_essays).corpus,
    )


def _listed_in_order(answer: str, *, reference: str) -> float:
    """As `words_in_order`, whatever stands between the words: commas, numbers, lines."""
    expected, words = (" ".join(re.findall(r"[a-z]+", text.lower())) for text in (reference, answer))
    return words_in_order(words, reference=expected)


WORD_LIST = Task("word_list", "Recycled Attention (arXiv 2411.05787), tasks with long outputs", 0.0, _make)
