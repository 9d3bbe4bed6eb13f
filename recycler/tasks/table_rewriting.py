"""A generated table in HTML, to be written as tab-separated values.

HTML to TSV is a task with long outputs of Recycled Attention (arXiv 2411.05787). Deviations: the cells are drawn, and
there is no instruction; the first rows follow the table as values and show what is wanted. Unlike the kind
`table_rewriting` of `recycler.prompts`, whose rows come again in a drawn order, the answer ends with the table.
"""

from functools import partial
from itertools import accumulate, chain

from recycler.prompts.request import PromptRequest
from recycler.prompts.turning_kinds import drawn_table
from recycler.tasks.scores import lines_found
from recycler.tasks.task import Task, TaskPrompt, answered, room_left

# Rows that are written as values already.
_N_BEGUN = 2
# A few rows in HTML, those that are begun with, and one to ask for.
_LEAST_TOKENS = 256


def _make(request: PromptRequest) -> TaskPrompt:
    first, last = request.encode("<table>\n"), request.encode("</table>\n\n")
    n_room = room_left(request, len(first) + len(last), _LEAST_TOKENS)
    # The first rows take room twice, as values too; drawn again, they are the same.
    _, begun = drawn_table(request, request.rng(), n_room)
    html, rows = drawn_table(request, request.rng(), n_room - sum(map(len, begun[:_N_BEGUN])))
    asked = rows[_N_BEGUN:]
    n_asked = sum(n_tokens <= request.n_steps for n_tokens in accumulate(map(len, asked)))
    if n_asked == 0:
        raise ValueError(
            f"the task {request.kind} needs n_steps of at least {len(asked[0])}, a row, not {request.n_steps}"
        )
    answer = [*chain.from_iterable(asked[:n_asked])]
    question = [*first, *chain.from_iterable(html), *last, *chain.from_iterable(rows[:_N_BEGUN])]
    lines = [str(request.tokenizer.decode(row)) for row in asked[:n_asked]]
    return answered(request, question, answer, partial(lines_found, expected=lines), n_new_tokens=len(answer))


TABLE_REWRITING = Task("table_rewriting", "Recycled Attention (arXiv 2411.05787), tasks with long outputs", 0.0, _make)
