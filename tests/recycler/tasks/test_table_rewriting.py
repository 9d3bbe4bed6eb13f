"""A table's rows, asked for as tab-separated values in their order."""

import re
from collections.abc import Callable

import pytest

from recycler.tasks import TaskPrompt

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.mark.parametrize("index", range(4))
def test_what_is_asked_for_are_the_next_rows_of_the_table(made: Made, texts: Texts, index: int) -> None:
    question, answer = texts(made("table_rewriting", index, context_tokens=1500, n_steps=500))
    table, begun = question.split("</table>\n\n")
    rows = ["\t".join(re.findall("<td>(.*?)</td>", line)) for line in table.splitlines()[1:]]
    n_begun = 2
    assert begun.splitlines() == rows[:n_begun]
    asked = answer.splitlines()
    assert len(asked) > 20
    assert asked == rows[n_begun : n_begun + len(asked)]


def test_fewer_steps_ask_for_fewer_whole_rows(made: Made, texts: Texts) -> None:
    whole, cut = (made("table_rewriting", n_steps=n_steps) for n_steps in (400, 100))
    assert texts(whole)[1].startswith(texts(cut)[1])
    assert texts(cut)[1].endswith("\n")
    assert 80 < cut.n_new_tokens <= 100


def test_a_row_counts_where_all_of_its_cells_are_there(made: Made, texts: Texts) -> None:
    prompt = made("table_rewriting", n_steps=100)
    rows = texts(prompt)[1].splitlines()
    assert prompt.score("\n".join(rows)) == 1
    assert prompt.score("\n".join(rows[1:])) == pytest.approx(1 - 1 / len(rows))
    assert prompt.score("\n".join(row.replace("\t", " ") for row in rows)) == 0


def test_less_than_a_row_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"table_rewriting needs n_steps of at least \d+, a row, not 3"):
        made("table_rewriting", n_steps=3)


def test_a_table_of_more_rows_than_there_are_names_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"a table has \d+ rows at most, too few for \d+ tokens"):
        made("table_rewriting", context_tokens=200_000)
