"""Natural texts and copies are the prompts of `recycler.prompts`."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from recycler.prompts import default_prompts
from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("name", ["prose", "technical", "code", "copying"])
def test_prompt_is_the_one_that_policies_are_tuned_on(
    made: Made, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    (tuned_on,) = default_prompts(tokenizer, n_per_kind=1, context_tokens=1024, n_steps=50, kinds=[name], first_index=3)
    prompt = made(name, 3, n_steps=50).prompt
    assert np.array_equal(prompt.tokens, tuned_on.tokens)
    assert (prompt.name, prompt.n_prompt_tokens) == (tuned_on.name, tuned_on.n_prompt_tokens)


def test_copy_is_of_what_the_question_began_with(made: Made, texts: Texts) -> None:
    prompt = made("copying")
    question, answer = texts(prompt)
    assert answer in question[: len(question) // 2]
    assert prompt.n_new_tokens == prompt.prompt.n_steps == 64


def test_copy_that_skips_a_word_loses_that_word(made: Made, texts: Texts) -> None:
    prompt = made("copying")
    words = texts(prompt)[1].split()
    assert prompt.score(" ".join(words[:5] + words[6:])) == pytest.approx(1 - 1 / len(words))
