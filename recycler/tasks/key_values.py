"""A long list of ``key: value`` lines that is begun again, to be written to its end.

After the tasks with long outputs that Recycled Attention (arXiv 2411.05787) is measured on, such as
tables out of web pages: everything that is written stands far back, and the model must keep its place.
Deviations: the lines are drawn, and there is no instruction; the list's first lines follow it once more
and show what is wanted. Unlike the kind `key_values` of `recycler.prompts`, the order stays, so that a
model can go on by itself; keys are pairs of words and do not run out before 90,000 tokens.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain

from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import key_words
from recycler.tasks.scores import lines_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

# Lines that are written again already.
_N_BEGUN = 4


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    separator = request.encode("\n")
    lines: list[str] = []
    encoded: list[list[int]] = []
    n_left = request.n_context - len(separator)
    for line in _drawn_lines(rng):
        tokens = request.encode(line)
        # The first lines take their room twice.
        n_left -= len(tokens) * (2 if len(lines) < _N_BEGUN else 1)
        if n_left < 0:
            break
        lines.append(line)
        encoded.append(tokens)
    else:
        raise ValueError(
            f"the task {request.kind} has {len(lines)} lines, too few for a context of {request.context_tokens} "
            f"tokens: ask for at most {request.context_tokens - n_left}"
        )
    n_missing = _N_BEGUN + 1 - len(lines)
    if n_missing > 0:
        # One of the missing lines has made `n_left` negative; the others may be as long.
        room_left(request, request.n_context - n_left, 2 * (n_missing - 1) * len(tokens))

    n_asked = sum(n_tokens <= request.n_steps for n_tokens in accumulate(map(len, encoded[_N_BEGUN:])))
    if n_asked == 0:
        raise ValueError(
            f"the task {request.kind} needs n_steps of at least {len(encoded[_N_BEGUN])}, a line, not {request.n_steps}"
        )
    asked = slice(_N_BEGUN, _N_BEGUN + n_asked)
    answer = [*chain.from_iterable(encoded[asked])]
    return answered(
        request,
        [*chain.from_iterable(encoded), *separator, *chain.from_iterable(encoded[:_N_BEGUN])],
        answer,
        partial(lines_found, expected=lines[asked]),
        n_new_tokens=len(answer),
    )


def _drawn_lines(rng: random.Random) -> Iterator[str]:
    """Lines of distinct keys and distinct values, one for every number of four digits."""
    words = key_words()
    keys: set[str] = set()
    for value in rng.sample(range(10**3, 10**4), 9 * 10**3):
        key = "-".join(rng.sample(words, 2))
        while key in keys:
            key = "-".join(rng.sample(words, 2))
        keys.add(key)
        yield f"{key}: {value}\n"


KEY_VALUES = Task("key_values", "Recycled Attention (arXiv 2411.05787), tasks with long outputs", 0.0, _make)
