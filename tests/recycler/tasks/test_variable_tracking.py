"""The chain leads from the value to every variable asked for."""

import re
from collections.abc import Callable
from itertools import pairwise

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


def test_following_the_assignments_gives_the_answer(made: Made, texts: Texts) -> None:
    question, answer = texts(made("variable_tracking"))
    _, asked = question.split("\n\nMemorize")
    value = re.findall(r"assigned the value (\d{5}) in the text", asked)[-1]
    known = {value}
    found = []
    for name, assigned in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", asked, re.MULTILINE):
        assert assigned in known
        known.add(name)
        found.append(name)
    assert found == answer.split()
    assert len(set(found)) == 5


def test_assignments_are_whole_lines_scattered_over_the_text(made: Made, texts: Texts) -> None:
    question, _ = texts(made("variable_tracking", context_tokens=4000))
    _, asked = question.split("\n\nMemorize")
    lines = asked.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("VAR ")]
    assert len(at) == 5
    assert all(line.endswith("There and back again.") for i, line in enumerate(lines[2:-1], 2) if i not in at)
    assert max(at) - min(at) > len(lines) / 4
    assert all(later - earlier > 1 for earlier, later in pairwise(at))


def test_example_is_solved_and_none_of_its_names_is_asked_for(made: Made, texts: Texts) -> None:
    prompt = made("variable_tracking")
    question, _ = texts(prompt)
    example = question.split("\n\nMemorize")[0]
    names = example.rsplit("they are:", 1)[1].split()
    assert names == re.findall(r"^VAR ([A-Z]{3}) =", example, re.MULTILINE)
    assert prompt.score(" ".join(names)) == 0
