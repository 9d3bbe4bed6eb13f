"""The default model's tokenizer, and prompts of one task."""

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recycler.model.default_model import default_model_folder
from recycler.tasks import TaskPrompt, task_prompts


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(default_model_folder())


@pytest.fixture(scope="session")
def made(tokenizer: PreTrainedTokenizerBase) -> Callable[..., TaskPrompt]:
    """Makes the prompt of a task at an index."""

    def make(name: str, index: int = 0, *, context_tokens: int = 1024, n_steps: int = 64, seed: int = 0) -> TaskPrompt:
        (prompt,) = task_prompts(
            tokenizer,
            [name],
            n_prompts=1,
            context_tokens=context_tokens,
            n_steps=n_steps,
            seed=seed,
            first_index=index,
        )
        return prompt

    return make


@pytest.fixture(scope="session")
def texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[TaskPrompt], tuple[str, str]]:
    """The question and the reference answer of a prompt as texts."""

    def decode(made: TaskPrompt) -> tuple[str, str]:
        tokens, n_question = made.prompt.tokens, made.prompt.n_prompt_tokens
        return tokenizer.decode(tokens[:n_question]), tokenizer.decode(tokens[n_question:])

    return decode
