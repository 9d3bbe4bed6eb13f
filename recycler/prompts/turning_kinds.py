"""Prompts whose output turns: at moments that no clock knows it begins to need another part of the context.

Every continuation is made of segments, and a prompt says where they begin (`Prompt.events`), so that a schedule can be
told. Like the other kinds they are teacher-forced and go on for any number of steps.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from recycler.prompts.hiding import spliced
from recycler.prompts.kinds import TASK_LICENCE, PromptGenerator, key_value_lines, reshuffled, task_licence
from recycler.prompts.prompt import Prompt
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import Corpus, copied_text, haystack_text, key_words

# Tokens of a segment, drawn evenly: an output turns some ten times in 512 steps.
_SEGMENT_TOKENS = (24, 96)
# Room for the first segment, so that the continuation does not start cold.
_BEGUN_TOKENS = 32
_NOTE_TOKENS = 40
_TOKENS_PER_NOTE = 160
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Turin", "Osaka", "Quito", "Perth", "Dakar", "Leeds", "Malmo")


class Notes(NamedTuple):
    """Passages of some 40 tokens, each with a name.

    Attributes:
        names: A word each.
        quotes: Tokens of each.
        hidden: The same as they stand in a text, with their names.
        corpus: Where they come from.
    """

    names: list[str]
    quotes: list[list[int]]
    hidden: list[list[int]]
    corpus: Corpus


def drawn_notes(request: PromptRequest, rng: random.Random) -> Notes:
    """Notes for a prompt, one per 160 tokens of context."""
    n_notes = max(2, request.n_context // _TOKENS_PER_NOTE)
    quoted = request.texts(copied_text)
    names = rng.sample(key_words(), n_notes)
    quotes = [
        request.encode(" " + " ".join(str(request.tokenizer.decode(passage)).split()))
        for passage in (quoted.passage(request.index * n_notes + i, _NOTE_TOKENS) for i in range(n_notes))
    ]
    hidden = [
        [*request.encode(f" Note on {name}:"), *quote, *request.encode(" End of note.")]
        for name, quote in zip(names, quotes, strict=True)
    ]
    return Notes(names, quotes, hidden, quoted.corpus)


def several_questions(request: PromptRequest) -> Prompt:
    """Notes hidden in a long text, then questions that are answered by quoting one of them each.

    Notes are passages of some 40 tokens, one per 160 tokens of context; all are asked for in a drawn order, and again
    in another. A segment is a question with its answer.
    """
    rng = request.rng()
    notes, essays = drawn_notes(request, rng), request.texts(haystack_text)
    n_notes = len(notes.names)
    answers = [
        [*request.encode(f"What does the note on {name} say? It says:"), *quote, *request.encode("\n")]
        for name, quote in zip(notes.names, notes.quotes, strict=True)
    ]
    separator = request.encode("\n\n")
    n_hay = request.n_context - sum(map(len, notes.hidden)) - len(separator) - _BEGUN_TOKENS
    if n_hay < n_notes:
        raise ValueError(f"{request.context_tokens} tokens of context are too few to hide {n_notes} notes in")
    hay = essays.passage(request.index, request.n_context)[:n_hay]
    haystack = spliced(hay, notes.hidden, sorted(rng.sample(range(n_hay), n_notes)), request.tokenizer)
    return _turning(
        request,
        [*haystack, *separator],
        reshuffled(answers, rng),
        f"{essays.corpus.source}; {notes.corpus.source}",
        f"{essays.corpus.licence}; {notes.corpus.licence} (texts), {TASK_LICENCE} (task)",
    )


def jumping_copy(request: PromptRequest) -> Prompt:
    """A passage and then pieces of it, each from another place. A segment is a piece of 24 to 96 tokens.

    Of a passage below 192 tokens pieces have at most half.
    """
    rng, text = request.rng(), request.texts(copied_text)
    separator = request.encode("\n\n")
    passage = text.passage(request.index, request.n_context - len(separator) - _BEGUN_TOKENS).tolist()

    least, most = (min(n, len(passage) // 2) for n in _SEGMENT_TOKENS)

    def pieces() -> Iterator[list[int]]:
        while True:
            begin = rng.randrange(len(passage) - most)
            yield passage[begin : begin + rng.randint(least, most)]

    return _turning(request, [*passage, *separator], pieces(), text.corpus.source, text.corpus.licence)


def lists_in_prose(request: PromptRequest) -> Prompt:
    """A list of ``key: value`` lines and an essay; the essay goes on, with lines of the list between its parts.

    Segments are in turn 24 to 96 tokens of the essay and 3 to 6 lines.
    """
    rng, text = request.rng(), request.texts(haystack_text)
    lines = key_value_lines(request, rng, request.n_context // 2)
    listing = [*chain.from_iterable(lines), *request.encode("\n")]
    essay = text.passage(request.index, request.n_context + request.n_steps).tolist()
    n_read = request.n_context - len(listing) - _BEGUN_TOKENS

    def parts() -> Iterator[list[int]]:
        at, drawn, blank = n_read, reshuffled(lines, rng), request.encode("\n\n")
        while True:
            n = rng.randint(*_SEGMENT_TOKENS)
            yield essay[at : at + n]
            at += n
            yield [*blank, *chain.from_iterable(next(drawn) for _ in range(rng.randint(3, 6))), *request.encode("\n")]

    return _turning(
        request,
        [*listing, *essay[:n_read]],
        parts(),
        text.corpus.source,
        task_licence(text.corpus),
    )


def drawn_table(request: PromptRequest, rng: random.Random, n_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of a table in at most so many tokens of HTML, without its first and last line, and the same in TSV.

    Raises:
        ValueError: If there are too few names for so long a table.
    """
    words, n_left = key_words(), n_tokens
    names = rng.sample(words, len(words))
    html: list[list[int]] = []
    rows: list[list[int]] = []
    for name in names:
        cells = [name, rng.choice(_CITIES), str(rng.randint(18, 80)), str(rng.randint(1000, 9999))]
        written = request.encode("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n")
        n_left -= len(written)
        if n_left < 0:
            return html, rows
        html.append(written)
        rows.append(request.encode("\t".join(cells) + "\n"))
    raise ValueError(
        f"a table has {len(names)} rows at most, too few for {n_tokens} tokens of HTML: ask for a shorter context"
    )


def table_rewriting(request: PromptRequest) -> Prompt:
    """A generated table in HTML, then its rows as tab-separated values, in order, and again in a drawn order.

    HTML to TSV is the task of long outputs of Recycled Attention (arXiv 2411.05787). A segment is a row.
    """
    rng = request.rng()
    n_room = request.n_context - _BEGUN_TOKENS - len(request.encode("<table>\n</table>\n\n"))
    html, rows = drawn_table(request, rng, n_room)
    table = [*request.encode("<table>\n"), *chain.from_iterable(html), *request.encode("</table>\n\n")]
    return _turning(request, table, chain(rows, reshuffled(rows, rng)), "drawn by this project", TASK_LICENCE)


TURNING_KINDS: dict[str, PromptGenerator] = {
    "several_questions": several_questions,
    "jumping_copy": jumping_copy,
    "lists_in_prose": lists_in_prose,
    "table_rewriting": table_rewriting,
}


def _turning(
    request: PromptRequest, context: Sequence[int], segments: Iterable[list[int]], source: str, licence: str
) -> Prompt:
    """The prompt of a context and of segments after it; the first ones end the context."""
    tokens, begins = list(context), []
    for segment in segments:
        if len(tokens) >= request.n_context + request.n_steps:
            break
        begins.append(len(tokens) - request.n_context)
        tokens += segment
    return request.prompt(
        tokens[: request.n_context + request.n_steps],
        source=source,
        licence=licence,
        events=[begin for begin in begins if begin > 0],
    )
