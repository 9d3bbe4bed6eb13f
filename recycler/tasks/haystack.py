"""Long texts to hide something in: the essays, as in RULER, with what is hidden between their sentences."""

import random
from collections.abc import Sequence
from dataclasses import replace

from recycler.prompts.hiding import spliced
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import Corpus, haystack_text

# All the essays have 66,000 tokens with the default tokenizer; repeated, they serve a dozen prompts of any model's
# length. They are tokenised no further than is read.
_N_REPEATS = 64


def repeated_essays() -> Corpus:
    """The essays of `haystack_text`, over and over, as RULER repeats its own.

    Prompts of one size share text only when all of it has been used.
    """
    essays = haystack_text()
    return replace(essays, documents=essays.documents * _N_REPEATS)


def haystack(
    request: PromptRequest,
    hidden: Sequence[Sequence[int]],
    n_tokens: int,
    rng: random.Random,
    depths: tuple[float, float] = (0.0, 1.0),
) -> list[int]:
    """The essays of a prompt's index with `hidden` in them, in this order, each after a sentence.

    Args:
        request: what was asked for.
        hidden: tokens of each thing to hide; each begins with a space.
        n_tokens: of all together.
        rng: draws how deep each is hidden.
        depths: between which shares of the essays.
    """
    n_hay = n_tokens - sum(map(len, hidden))
    # A passage of the whole context's length: what tasks of equal size and index read does not depend on the task.
    hay = request.texts(repeated_essays).passage(request.index, request.n_context)[:n_hay]
    low, high = (round(depth * n_hay) for depth in depths)
    drawn = sorted(rng.randrange(low, high) for _ in hidden)
    return spliced(hay, hidden, drawn, request.tokenizer)
