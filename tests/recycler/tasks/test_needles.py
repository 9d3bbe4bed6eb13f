"""Needles lie where they were drawn, once each, and what is asked for is what was hidden."""

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from recycler.tasks import TaskPrompt, task_prompts

NEEDLE = re.compile(r" One of the special magic numbers for (\w+) is: (\d{7})\.")

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize(
    ("name", "n_keys", "n_needles", "n_answers"),
    [
        ("single_needle", 1, 1, 1),
        ("multi_key_needle", 8, 8, 1),
        ("multi_value_needle", 1, 4, 4),
        ("multi_query_needle", 4, 4, 4),
    ],
)
def test_what_is_asked_for_is_hidden_once(
    made: Made, texts: Texts, name: str, n_keys: int, n_needles: int, n_answers: int
) -> None:
    question, answer = texts(made(name))
    hidden = NEEDLE.findall(question)
    assert len(hidden) == n_needles
    assert len({key for key, _ in hidden}) == n_keys
    asked = re.search(r"special magic numbers? for ([\w, ]+) mentioned in the provided text\?", question)
    assert asked is not None
    keys = re.findall(r"\w+", asked[1].replace("and ", ""))
    expected = [number for key in keys for hidden_key, number in hidden if hidden_key == key]
    assert len(expected) == n_answers
    assert re.findall(r"\d+", answer) == expected
    assert all(question.count(number) == 1 for number in expected)


@pytest.mark.parametrize(("context_tokens", "n_keys"), [(256, 2), (512, 4), (640, 5), (4096, 8)])
def test_several_keys_are_one_per_128_tokens_up_to_8(
    made: Made, texts: Texts, context_tokens: int, n_keys: int
) -> None:
    question, _ = texts(made("multi_key_needle", context_tokens=context_tokens))
    assert len(NEEDLE.findall(question)) == n_keys


def test_needles_lie_between_sentences(made: Made, texts: Texts) -> None:
    question, _ = texts(made("multi_key_needle"))
    before = re.findall(r"(.)[\"')\n]* One of the special magic numbers", question)
    assert len(before) == 8
    assert set(before) <= set(".?!")


def test_needles_lie_at_all_depths(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> None:
    depths = []
    for prompt in task_prompts(tokenizer, ["single_needle"], n_prompts=24, context_tokens=1024):
        question, _ = texts(prompt)
        depths.append(question.index(" One of the special magic numbers") / len(question))
    assert min(depths) < 0.25 < 0.75 < max(depths)
    assert sum(0.25 < depth < 0.75 for depth in depths) >= 6


def test_a_longer_number_is_not_the_number(made: Made, texts: Texts) -> None:
    prompt = made("single_needle")
    number = texts(prompt)[1].strip(" .")
    assert prompt.score(f"It is {number}!") == 1
    assert prompt.score(f"It is {number}0!") == 0


def test_essays_are_repeated_where_they_are_used_up(made: Made, texts: Texts) -> None:
    # All of them have 66,000 tokens.
    first, last = (texts(made("single_needle", index, context_tokens=8000))[0] for index in (0, 20))
    assert len(last) > 20_000
    assert first != last
