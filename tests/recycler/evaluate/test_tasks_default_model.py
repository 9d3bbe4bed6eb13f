"""The tasks on the embedded default model: full attention's answer is that of stock `generate`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recycler import LoadedModel, load_model
from recycler.evaluate.answers import measure
from recycler.tasks import TASKS, TaskPrompt, task_prompts

# The fewest tokens that each task has room in, within what keeps this cheap.
CONTEXTS = range(256, 769, 64)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None)


def smallest(loaded: LoadedModel, name: str) -> TaskPrompt:
    for context_tokens in CONTEXTS:
        try:
            (task,) = task_prompts(loaded.tokenizer, [name], n_prompts=1, context_tokens=context_tokens, n_steps=16)
        except ValueError as error:
            assert "context of at least" in str(error)  # noqa: PT017
        else:
            return task
    raise AssertionError(f"{name} needs more than {CONTEXTS[-1]} tokens")


@pytest.mark.parametrize("name", TASKS)
def test_full_attentions_answer_is_that_of_stock_generate_and_scores_the_same(loaded: LoadedModel, name: str) -> None:
    task = smallest(loaded, name)
    # What comes later in long answers is of the same kind.
    task = replace(task, n_new_tokens=min(task.n_new_tokens, 16))
    if not task.n_new_tokens:
        assert measure(loaded, task, []).methods["full"].answer is None
        return
    prompt = torch.as_tensor(task.prompt.tokens[: task.prompt.n_prompt_tokens].astype(np.int64))[None]
    written = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=task.n_new_tokens
    )
    answer = str(loaded.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
    full = measure(loaded, task, []).methods["full"]
    assert full.answer == answer
    assert full.score == task.score(answer)
    assert full.kl.max() == 0
    assert full.answer_full_share == full.answer_read_share == 1
