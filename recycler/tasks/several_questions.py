"""Notes hidden in a long text, which are to be quoted one after another, each from another place.

After the needles of RULER (arXiv 2404.06654) and the tasks with long outputs of Recycled Attention (arXiv 2411.05787).
Deviations: a needle is a passage of some 40 tokens; all are asked for at once, by name and in a drawn order, and the
first is quoted already. Unlike the kind `several_questions` of `recycler.prompts`, a model can go on by itself.
"""

from dataclasses import replace
from functools import partial
from itertools import chain

from recycler.prompts.request import PromptRequest
from recycler.prompts.turning_kinds import drawn_notes
from recycler.tasks.haystack import haystack, repeated_essays
from recycler.tasks.scores import words_in_order
from recycler.tasks.task import Task, TaskPrompt, answered, room_left


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    notes = drawn_notes(request, rng)
    order = rng.sample(range(len(notes.names)), len(notes.names))
    asked_for = ", ".join(notes.names[place] for place in order)
    listing = request.encode(f"\n\nQuote the notes on {asked_for}, in this order.\n")
    quoted = [
        [*request.encode(f"Note on {notes.names[place]}:"), *notes.quotes[place], *request.encode("\n")]
        for place in order
    ]
    begun = quoted[0]
    n_hidden = sum(map(len, notes.hidden))
    # A haystack has as much text as there is hidden in it.
    n_room = room_left(request, len(listing) + len(begun), 2 * n_hidden)
    answer = [*chain.from_iterable(quoted[1:])][: request.n_steps]
    essays, quotes = request.texts(repeated_essays).corpus, notes.corpus
    return answered(
        request,
        [*haystack(request, notes.hidden, n_room, rng), *listing, *begun],
        answer,
        partial(words_in_order, reference=str(request.tokenizer.decode(answer))),
        corpus=replace(
            essays,
            source=f"{essays.source}; {quotes.source}",
            licence=f"{essays.licence}; {quotes.licence}",
        ),
        n_new_tokens=len(answer),
    )


SEVERAL_QUESTIONS = Task(
    "several_questions", "RULER (arXiv 2404.06654); Recycled Attention (arXiv 2411.05787)", 0.0, _make
)
