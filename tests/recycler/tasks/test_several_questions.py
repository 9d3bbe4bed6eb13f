"""Notes in a long text, asked for by name and in an order that is not theirs."""

import re
from collections.abc import Callable

import pytest

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("index", range(4))
def test_what_is_asked_for_stands_in_the_text_under_its_name(made: Made, texts: Texts, index: int) -> None:
    question, answer = texts(made("several_questions", index, context_tokens=1500, n_steps=500))
    asked_for = re.search("Quote the notes on (.*), in this order", question)
    assert asked_for is not None
    # The last line may be cut.
    answered = dict(line.removeprefix("Note on ").split(":", 1) for line in answer.splitlines(keepends=True)[:-1])
    names = asked_for[1].split(", ")
    assert list(answered) == names[1 : 1 + len(answered)]
    assert len(answered) > 4
    for name, quote in answered.items():
        assert question.count(f" Note on {name}:{quote.rstrip()} End of note.") == 1


def test_the_first_note_is_quoted_already(made: Made, texts: Texts) -> None:
    question, _ = texts(made("several_questions"))
    *_, shown = question.splitlines()
    name, quote = shown.removeprefix("Note on ").split(":", 1)
    assert question.index(f"Note on {name}:{quote} End of note.") < question.index("Quote the notes on")


def test_fewer_steps_ask_for_the_beginning(made: Made, texts: Texts) -> None:
    whole, cut = (made("several_questions", n_steps=n_steps) for n_steps in (300, 30))
    assert texts(whole)[1].startswith(texts(cut)[1])
    assert cut.prompt.n_steps == cut.n_new_tokens == 30
    assert cut.score(texts(whole)[1]) > 0.9


def test_words_count_in_their_order(made: Made, texts: Texts) -> None:
    prompt = made("several_questions", n_steps=200)
    words = texts(prompt)[1].split()
    half = len(words) // 2
    assert prompt.score(" ".join(words[:half])) == pytest.approx(half / len(words))
    assert prompt.score(" ".join(reversed(words))) < 0.3


def test_a_context_without_room_for_a_text_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match="several_questions needs a context of at least"):
        made("several_questions", context_tokens=200)
