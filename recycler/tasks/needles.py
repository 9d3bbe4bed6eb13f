"""Numbers hidden in a long text, of which some are asked for.

RULER (arXiv 2404.06654), the four variants of "needle in a haystack", with its wording of needles,
questions and answers. Deviations: keys are single words out of Python's documentation instead of pairs
of an adjective and a noun; several keys are up to 8, one per 128 tokens of context and at least 2, where
RULER has 4; depths are drawn anywhere instead of from 40 equidistant ones; the haystack fills the context
to the token and so may end within a sentence; only the essays are a haystack.
"""

from collections.abc import Sequence
from functools import partial

from recycler.prompts.hiding import MOST_NEEDLES, TOKENS_PER_NEEDLE, needle
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import key_words
from recycler.tasks.haystack import haystack, repeated_essays
from recycler.tasks.scores import strings_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

_SOURCE = "RULER (arXiv 2404.06654)"
# What RULER has in its variants with several values and several queries.
_N_SEVERAL = 4


def _single(request: PromptRequest) -> TaskPrompt:
    return _hidden_numbers(request, n_keys=1, n_values=1, n_asked=1)


def _multi_key(request: PromptRequest) -> TaskPrompt:
    n_keys = max(2, min(MOST_NEEDLES, request.n_context // TOKENS_PER_NEEDLE))
    return _hidden_numbers(request, n_keys=n_keys, n_values=1, n_asked=1)


def _multi_value(request: PromptRequest) -> TaskPrompt:
    return _hidden_numbers(request, n_keys=1, n_values=_N_SEVERAL, n_asked=1)


def _multi_query(request: PromptRequest) -> TaskPrompt:
    return _hidden_numbers(request, n_keys=_N_SEVERAL, n_values=1, n_asked=_N_SEVERAL)


def _hidden_numbers(request: PromptRequest, *, n_keys: int, n_values: int, n_asked: int) -> TaskPrompt:
    rng = request.rng()
    keys = rng.sample(key_words(), n_keys)
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), n_keys * n_values)]
    # In this order in the text: values of one key are listed in the answer as they come.
    needles = list(zip(keys * n_values, numbers, strict=True))
    asked = rng.sample(keys, n_asked)
    expected = [number for key in asked for needle_key, number in needles if needle_key == key]

    head, tail = _wording(_listed(asked), several=len(expected) > 1)
    opening, question = request.encode(head), request.encode(tail)
    hidden = [request.encode(needle(key, number)) for key, number in needles]
    n_hidden = sum(map(len, hidden))
    # At least as much hay as needles, or nothing would be hidden.
    n_room = room_left(request, len(opening) + len(question), 2 * n_hidden)
    return answered(
        request,
        [*opening, *haystack(request, hidden, n_room, rng), *question],
        request.encode(f" {_listed(expected)}."),
        partial(strings_found, expected=expected),
        corpus=request.texts(repeated_essays).corpus,
    )


def _wording(asked: str, *, several: bool) -> tuple[str, str]:
    """What comes before the haystack and after it."""
    if several:
        return (
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the numbers afterwards.\n",
            f"\nWhat are all the special magic numbers for {asked} mentioned in the provided text? "
            f"The special magic numbers for {asked} mentioned in the provided text are",
        )
    return (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        f"\nWhat is the special magic number for {asked} mentioned in the provided text? "
        f"The special magic number for {asked} mentioned in the provided text is",
    )


def _listed(things: Sequence[str]) -> str:
    """ "a", or "a, b, and c"."""
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])}, and {things[-1]}"


NEEDLE_TASKS = (
    Task("single_needle", _SOURCE, 0.0, _single),
    Task("multi_key_needle", _SOURCE, 0.0, _multi_key),
    Task("multi_value_needle", _SOURCE, 0.0, _multi_value),
    Task("multi_query_needle", _SOURCE, 0.0, _multi_query),
)
