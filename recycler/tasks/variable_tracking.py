"""A chain of assignments scattered over a monotonous text: which variables have the value?

RULER (arXiv 2404.06654), variable tracking: one chain of 4 hops in its repeated noise sentences, after
one solved example with shorter names. Deviations: the example has a noise line between any two
assignments, of which RULER's has more; the noise fills the context to the token and so begins within a
line; "assgined" is spelt "assigned".
"""

import random
import string
from collections.abc import Sequence
from functools import partial

from recycler.prompts.request import PromptRequest
from recycler.tasks.scores import strings_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

_N_VARIABLES = 5
_NAME_LETTERS = 5
_EXAMPLE_NAME_LETTERS = 3
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    noise = request.encode(_NOISE)
    # Names of the example are shorter, so none of them is one of the question's.
    example_value, value = (str(number) for number in rng.sample(range(10**4, 10**5), 2))
    example_names = _names(rng, _EXAMPLE_NAME_LETTERS)
    names = _names(rng, _NAME_LETTERS)
    example_text = _NOISE.join(_assignments(example_names, example_value))
    example = f"{_OPENING}{_NOISE}{example_text}{_NOISE}{_question(example_value)} {' '.join(example_names)}\n\n"

    opening = request.encode(example + _OPENING)
    question = request.encode(_question(value))
    assignments = [request.encode(line) for line in _assignments(names, value)]
    n_assignment_tokens = sum(map(len, assignments))
    # A line of noise after every assignment, and some before the first.
    n_least = (_N_VARIABLES + 1) * len(noise) + n_assignment_tokens
    n_noise = room_left(request, len(opening) + len(question), n_least) - n_assignment_tokens

    n_lines, n_begun = divmod(n_noise, len(noise))
    text = noise[len(noise) - n_begun :]
    before = dict(zip(sorted(rng.sample(range(n_lines), _N_VARIABLES)), assignments, strict=True))
    for line in range(n_lines):
        text += [*before.get(line, ()), *noise]
    return answered(
        request,
        [*opening, *text, *question],
        request.encode(f" {' '.join(names)}"),
        partial(strings_found, expected=names),
    )


def _names(rng: random.Random, n_letters: int) -> list[str]:
    """Distinct names of capital letters."""
    names: dict[str, None] = {}
    while len(names) < _N_VARIABLES:
        names["".join(rng.choices(string.ascii_uppercase, k=n_letters))] = None
    return list(names)


def _assignments(names: Sequence[str], value: str) -> list[str]:
    """A line for each variable: the first has the value, every other is set to the one before it."""
    values = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {assigned}\n" for name, assigned in zip(names, values, strict=False)]


def _question(value: str) -> str:
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_N_VARIABLES} variables are assigned the value {value}, they are:"
    )


VARIABLE_TRACKING = Task("variable_tracking", "RULER (arXiv 2404.06654)", 0.0, _make)
