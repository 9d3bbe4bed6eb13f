"""What a task is: a way to make questions about long contexts, with their answers and how they are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recycler.prompts import Prompt
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import Corpus, leading_tokens

_LICENCE = "Apache-2.0 (this project)"

# Tokens that an answer may have beyond its reference: a model puts a few words before it, or writes it otherwise.
MARGIN_TOKENS = 11

Score = Callable[[str], float]


@dataclass(frozen=True, eq=False)
class TaskPrompt:
    """A question about a long context, with its answer written out.

    Attributes:
        prompt: the question followed by the reference answer, which is teacher-forced; the answer
            begins at ``n_prompt_tokens``. Its name is such as "single_needle-003", its kind the task's name.
        n_new_tokens: most tokens to generate when the model answers by itself; 0 for a task that is
            only teacher-forced.
        score: what an answer in the model's own words earns, in [0, 1]. The reference earns 1, an
            empty answer 0. It is meant for the text of at most `n_new_tokens` tokens. A text that is only
            teacher-forced has no right answer: it scores the words that its author wrote.
    """

    prompt: Prompt
    n_new_tokens: int
    score: Score


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: as in ``TASKS``.
        source: the paper that describes it.
        chance: the mean score of guessing without reading the context, in [0, 1).
        make: makes the prompt that is asked for; its `kind` is this name. Raises ValueError where the
            sizes asked for have no room for the task.
    """

    name: str
    source: str
    chance: float
    make: Callable[[PromptRequest], TaskPrompt]


def answered(
    request: PromptRequest,
    question: Sequence[int],
    answer: Sequence[int],
    score: Score,
    *,
    corpus: Corpus | None = None,
    n_new_tokens: int | None = None,
) -> TaskPrompt:
    """The question and its answer in tokens, put together.

    Args:
        request: what was asked for.
        question: at most ``request.n_context`` tokens; a BOS is put before them.
        answer: at least one token.
        score: of an answer's text.
        corpus: where natural text in the question comes from; None where all of it is drawn.
        n_new_tokens: most tokens of the model's own answer; None for those of `answer` and a few more.
    """
    leading = leading_tokens(request.tokenizer)
    prompt = Prompt(
        name=f"{request.kind}-{request.index:03d}",
        kind=request.kind,
        tokens=np.array([*leading, *question, *answer]),
        n_prompt_tokens=len(leading) + len(question),
        source=corpus.source if corpus else "drawn by this project",
        licence=f"{corpus.licence} (text), {_LICENCE} (task)" if corpus else _LICENCE,
    )
    return TaskPrompt(prompt, len(answer) + MARGIN_TOKENS if n_new_tokens is None else n_new_tokens, score)


def room_left(request: PromptRequest, n_taken: int, n_least: int) -> int:
    """Tokens of the context that are left beside `n_taken` of the question.

    Raises:
        ValueError: fewer than `n_least` are left.
    """
    n_left = request.n_context - n_taken
    if n_left < n_least:
        raise ValueError(
            f"the task {request.kind} needs a context of at least {request.context_tokens - n_left + n_least} tokens, "
            f"not {request.context_tokens}"
        )
    return n_left
