"""The list stands once, early in the text, and is asked for at the end."""

from collections.abc import Callable

import pytest

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("index", range(6))
def test_list_stands_once_in_the_first_half(made: Made, texts: Texts, index: int) -> None:
    question, answer = texts(made("word_list", index, context_tokens=2048))
    assert question.count(answer) == 1
    assert question.index(answer) < len(question) / 2
    assert len(set(answer.strip(" .").split(", "))) == 16


def test_words_count_in_order_however_they_are_set(made: Made, texts: Texts) -> None:
    prompt = made("word_list")
    words = texts(prompt)[1].strip(" .").split(", ")
    assert prompt.score("\n".join(f"{i}. {word.upper()}" for i, word in enumerate(words, 1))) == 1
    assert prompt.score(" ".join(words[:8])) == 0.5
    assert prompt.score(" ".join(reversed(words))) == 1 / 16


def test_fewer_steps_ask_for_the_beginning_of_the_list(made: Made, texts: Texts) -> None:
    whole, cut = made("word_list"), made("word_list", n_steps=9)
    assert texts(whole)[1].startswith(texts(cut)[1])
    assert cut.prompt.n_steps == cut.n_new_tokens == 9
    assert cut.score(texts(whole)[1]) == pytest.approx(1, abs=0.4)
    assert cut.score(texts(cut)[1]) == 1
