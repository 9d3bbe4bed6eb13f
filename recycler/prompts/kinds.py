"""What each kind of prompt is made of: one generator per kind.

Natural texts are continued as they were written. The other kinds are long-context tasks after
RULER (arXiv 2404.06654), reshaped so that a teacher-forced continuation of any length keeps asking:
every step of it depends on something far back in the context.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from recycler.prompts.hiding import MOST_NEEDLES, TOKENS_PER_NEEDLE, needle, spliced
from recycler.prompts.prompt import Prompt
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import (
    Corpus,
    TextSource,
    copied_text,
    haystack_text,
    key_words,
)

# Room for the first lines that are asked for, so that the continuation does not start cold.
_ASKED_TOKENS = 32
TASK_LICENCE = "Apache-2.0 (this project)"


PromptGenerator = Callable[[PromptRequest], Prompt]


def natural(source: TextSource) -> PromptGenerator:
    """A generator of passages of `source`, each to be continued as it was written."""

    def generate(request: PromptRequest) -> Prompt:
        text = request.texts(source)
        tokens = text.passage(request.index, request.n_context + request.n_steps)
        return request.prompt(tokens, source=text.corpus.source, licence=text.corpus.licence)

    return generate


def copying(request: PromptRequest) -> Prompt:
    """A passage and then the same passage again, with no instruction; the continuation copies on.

    The passage fills three quarters of the context and its first third the rest. A continuation
    that comes to the end of the passage starts it once more.
    """
    text = request.texts(copied_text)
    separator = request.encode("\n\n")
    n_passage = request.n_context * 3 // 4 - len(separator)
    passage = text.passage(request.index, n_passage)
    tokens = np.resize([*passage, *separator], request.n_context + request.n_steps)
    return request.prompt(tokens, source=text.corpus.source, licence=text.corpus.licence)


def needles(request: PromptRequest) -> Prompt:
    """Numbers hidden in a long text, then questions about them with their answers.

    RULER's multi-key needles with up to 8 keys, one per 128 tokens of context. Where RULER asks for
    one key, this asks for all of them in a drawn order, and again in another, until the
    continuation is full. The prompt ends with the first answer.
    """
    rng = request.rng()
    n_needles = max(1, min(MOST_NEEDLES, request.n_context // TOKENS_PER_NEEDLE))
    numbers = dict(zip(rng.sample(key_words(), n_needles), rng.sample(range(10**6, 10**7), n_needles), strict=True))
    hidden = [request.encode(needle(key, number)) for key, number in numbers.items()]
    asked = [
        request.encode(f"What is the special magic number for {key}? {number}\n") for key, number in numbers.items()
    ]
    separator = request.encode("\n\n")
    questions = reshuffled(asked, rng)
    first_question = next(questions)

    text = request.texts(haystack_text)
    n_hay = request.n_context - sum(map(len, hidden)) - len(separator) - len(first_question)
    if n_hay < n_needles:
        raise ValueError(f"{request.context_tokens} tokens of context are too few to hide {n_needles} numbers in")
    hay = text.passage(request.index, request.n_context)[:n_hay]
    depths = sorted(rng.sample(range(n_hay), n_needles))
    haystack = spliced(hay, hidden, depths, request.tokenizer)
    answers = islice(chain.from_iterable(questions), request.n_steps)
    return request.prompt(
        [*haystack, *separator, *first_question, *answers],
        source=text.corpus.source,
        licence=task_licence(text.corpus),
    )


def key_values(request: PromptRequest) -> Prompt:
    """A long list of ``key: value`` lines, then the same lines in a drawn order, and in another.

    A key cannot be foreseen and its value can only be looked up. Keys and values are distinct.
    """
    rng, separator = request.rng(), request.encode("\n")
    lines = key_value_lines(request, rng, request.n_context - _ASKED_TOKENS - len(separator))
    listing = [*chain.from_iterable(lines), *separator]
    n_asked = request.n_context + request.n_steps - len(listing)
    asked = islice(chain.from_iterable(reshuffled(lines, rng)), n_asked)
    return request.prompt([*listing, *asked], source="drawn by this project", licence=TASK_LICENCE)


def key_value_lines(request: PromptRequest, rng: random.Random, n_room: int) -> list[list[int]]:
    """Tokens of ``key: value`` lines, as many as fit into `n_room` tokens; keys and values are distinct.

    Raises:
        ValueError: there are too few keys to fill the room.
    """
    words = key_words()
    keys = rng.sample(words, len(words))
    lines: list[list[int]] = []
    for key, value in zip(keys, rng.sample(range(1000, 10000), len(keys)), strict=True):
        line = request.encode(f"{key}: {value}\n")
        n_room -= len(line)
        if n_room < 0:
            return lines
        lines.append(line)
    raise ValueError(
        f"{len(keys)} distinct keys do not fill {request.context_tokens} tokens of context: ask for fewer tokens"
    )


def reshuffled(lines: Sequence[list[int]], rng: random.Random) -> Iterator[list[int]]:
    """All of `lines` in a drawn order, then all of them in another, without end."""
    while True:
        yield from rng.sample(lines, len(lines))


def task_licence(corpus: Corpus) -> str:
    return f"{corpus.licence} (text), {TASK_LICENCE} (task)"
