"""The list is begun again in the same order, and the answer goes on with it."""

from collections.abc import Callable

import pytest

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("n_steps", [20, 64, 200])
def test_answer_goes_on_with_the_list(made: Made, texts: Texts, n_steps: int) -> None:
    prompt = made("key_values", n_steps=n_steps)
    question, answer = texts(prompt)
    listing, begun = (part.splitlines() for part in question.split("\n\n"))
    assert begun == listing[:4]
    n_asked = len(answer.splitlines())
    assert answer.splitlines() == listing[4 : 4 + n_asked]
    assert answer.endswith("\n")
    assert 0 <= n_steps - prompt.prompt.n_steps < 20
    assert prompt.n_new_tokens == prompt.prompt.n_steps


def test_keys_and_values_are_distinct(made: Made, texts: Texts) -> None:
    question, _ = texts(made("key_values", context_tokens=32_000))
    pairs = [line.split(": ") for line in question.split("\n\n")[0].splitlines()]
    assert len(pairs) > 2000
    assert all(len(set(column)) == len(pairs) for column in zip(*pairs, strict=True))


def test_score_is_the_share_of_lines_wherever_they_stand(made: Made, texts: Texts) -> None:
    prompt = made("key_values")
    lines = texts(prompt)[1].splitlines()
    assert prompt.score("\n".join(["more-lines: 1", *reversed(lines[1:])])) == pytest.approx(1 - 1 / len(lines))
    assert prompt.score(lines[0][:-1]) == 0


def test_fewer_steps_than_a_line_are_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"key_values needs n_steps of at least (\d+), a line, not 3") as caught:
        made("key_values", n_steps=3)
    n_least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert made("key_values", n_steps=n_least).prompt.n_steps == n_least


def test_more_tokens_than_there_are_values_for_are_refused(made: Made) -> None:
    with pytest.raises(
        ValueError, match=r"has 9000 lines, too few for a context of 200000 tokens: ask for at most \d+"
    ):
        made("key_values", context_tokens=200_000)
