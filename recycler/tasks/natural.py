"""Natural texts and their copies, continued as they were written: the prompts that policies are tuned on.

`prose`, `technical` and `code` are language modelling, as Recycled Attention (arXiv 2411.05787) is
measured first. Nobody can write an author's next words, so they are teacher-forced only.

`copying` asks for long outputs that are all in the context, after the same paper's tasks with long
outputs. Deviation: it has no instruction; the passage is begun again and goes on by itself.

All four are prompts of `recycler.prompts` of the same kind, index and sizes: a policy that was tuned
there must be measured on prompts of other indices.
"""

from functools import partial

from recycler.prompts import KINDS
from recycler.prompts.request import PromptRequest
from recycler.tasks.scores import words_in_order
from recycler.tasks.task import Task, TaskPrompt

_SOURCE = "Recycled Attention (arXiv 2411.05787)"


def _teacher_forced(request: PromptRequest) -> TaskPrompt:
    return _continued(request, n_new_tokens=0)


def _copying(request: PromptRequest) -> TaskPrompt:
    return _continued(request, n_new_tokens=request.n_steps)


def _continued(request: PromptRequest, *, n_new_tokens: int) -> TaskPrompt:
    prompt = KINDS[request.kind](request)
    reference = str(request.tokenizer.decode(prompt.tokens[prompt.n_prompt_tokens :]))
    return TaskPrompt(prompt, n_new_tokens, partial(words_in_order, reference=reference))


COPYING = Task("copying", _SOURCE, 0.0, _copying)
NATURAL_TASKS = tuple(Task(name, _SOURCE, 0.0, _teacher_forced) for name in ("prose", "technical", "code"))
