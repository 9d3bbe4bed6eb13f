"""The table of a comparison, from outcomes that were made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from recycler.evaluate import Outcome, PromptOutcome
from recycler.evaluate.summary import QUARTERS, Row, can_do, curves, kl_shares, rows_to_json, summarise
from traces.reporting.estimate import bootstrap, bootstrap_ratio


def forced(kl: Sequence[float], agree: Sequence[bool], nll: Sequence[float], full: float, read: float) -> Outcome:
    return Outcome(np.array(kl), np.array(agree, dtype=bool), np.array(nll) > 0, np.array(nll), full, read)


def answered(score: float, full: float = 0.5, read: float = 0.5, kl: float = 0.0) -> Outcome:
    """An outcome with an answer; its shares are twice those along the reference."""
    nothing = np.array([])
    return Outcome(
        np.array([kl]), np.array([True]), nothing > 0, nothing, full / 2, read / 2, "text", score, full, read
    )


def prompt(task: str, index: int, **methods: Outcome) -> PromptOutcome:
    return PromptOutcome(f"{task}-{index:03d}", task, 100, methods)


FULL = forced([0, 0], [True, True], [0.0], 1, 1)
PROSE = [
    prompt("prose", 0, full=FULL, ours=forced([1, 3], [True, False], [0.5], 0.1, 0.3)),
    prompt("prose", 1, full=FULL, ours=forced([4, 6, 8], [False, False, True], [1.0, 2.0], 0.3, 0.5)),
]
NEEDLE = [
    prompt("needle", 0, full=answered(1.0, 1, 1), ours=answered(0.5, 0.2, 0.4)),
    prompt("needle", 1, full=answered(0.5, 1, 1), ours=answered(0.5, 0.4, 0.6)),
]


def one(rows: Sequence[Row], method: str, task: str, measure: str) -> Row:
    (row,) = (row for row in rows if (row.method, row.task, row.measure) == (method, task, measure))
    return row


def test_a_row_is_the_mean_over_prompts_of_the_mean_over_steps() -> None:
    rows = summarise(PROSE)
    # Prompts weigh alike, however long they are.
    for measure, means in (("kl", [2, 6]), ("agreement", [1 / 2, 1 / 3]), ("nll_change", [0.5, 1.5])):
        row, expected = one(rows, "ours", "prose", measure), bootstrap(np.array(means))
        assert (row.value, row.low, row.high) == (expected.value, expected.low, expected.high)
        assert (row.full_share, row.read_share) == (pytest.approx(0.2), pytest.approx(0.4))
    assert one(rows, "full", "prose", "kl") == Row("full", "prose", "kl", 0, 0, 0, 1, 1)


def test_texts_that_are_only_teacher_forced_have_no_accuracy() -> None:
    measures = {row.measure for row in summarise(PROSE)}
    assert measures == {"kl", "kl_p95", "above_1_nat", "agreement", "nll_change", "full_share", "read_share"}


def test_kl_along_the_output_is_told_by_quarters_and_tails() -> None:
    steps = [0.0, 0.2, 0.4, 0.4, 2.0, 4.0, 1.0, 8.0]
    agree, nll = [True] * len(steps), [0.0] * (len(steps) - 1)
    rows = summarise([prompt("prose", 0, full=FULL, ours=forced(steps, agree, nll, 0.1, 0.3))])
    told = {row.measure: row.value for row in rows if row.method == "ours"}
    assert [told[name] for name in QUARTERS] == pytest.approx([0.1, 0.4, 3.0, 4.5])
    assert told["kl_p95"] == pytest.approx(np.quantile(steps, 0.95))
    assert told["above_1_nat"] == pytest.approx(3 / 8)


def test_shares_are_rows_of_their_own_with_intervals() -> None:
    rows = summarise(PROSE)
    for measure, shares in (("full_share", [0.1, 0.3]), ("read_share", [0.3, 0.5])):
        row, expected = one(rows, "ours", "prose", measure), bootstrap(np.array(shares))
        assert (row.value, row.low, row.high) == (expected.value, expected.low, expected.high)


def test_accuracy_is_of_the_answers_and_so_are_its_shares() -> None:
    row = one(summarise(NEEDLE), "ours", "needle", "accuracy")
    assert (row.value, row.low, row.high) == (0.5, 0.5, 0.5)
    assert (row.full_share, row.read_share) == (pytest.approx(0.3), pytest.approx(0.5))
    teacher_forced = one(summarise(NEEDLE), "ours", "needle", "kl")
    assert (teacher_forced.full_share, teacher_forced.read_share) == (pytest.approx(0.15), pytest.approx(0.25))


def test_accuracy_kept_is_the_ratio_of_the_means_on_the_same_prompts() -> None:
    rows = summarise(NEEDLE)
    row, expected = (
        one(rows, "ours", "needle", "accuracy_kept"),
        bootstrap_ratio(np.array([0.5, 0.5]), np.array([1, 0.5])),
    )
    assert (row.value, row.low, row.high) == (expected.value, expected.low, expected.high)
    assert row.value == pytest.approx(2 / 3)
    own = one(rows, "full", "needle", "accuracy_kept")
    assert (own.value, own.low, own.high) == (1, 1, 1)


def test_nothing_is_kept_of_what_full_attention_cannot_do() -> None:
    outcomes = [
        prompt("needle", 0, full=answered(0.0), ours=answered(1.0)),
        prompt("needle", 1, full=answered(1.0), ours=answered(1.0)),
    ]
    measures = {row.measure for row in summarise(outcomes) if row.method == "ours"}
    assert "accuracy" in measures
    assert "accuracy_kept" not in measures


def test_steps_without_a_next_token_have_no_change_of_likelihood() -> None:
    assert not [row for row in summarise(NEEDLE) if row.measure == "nll_change"]


def test_all_is_the_mean_over_prompts_of_all_tasks() -> None:
    rows = summarise([*PROSE, *NEEDLE])
    row, expected = one(rows, "ours", "all", "kl"), bootstrap(np.array([2.0, 6.0, 0.0, 0.0]))
    assert (row.value, row.low, row.high) == (expected.value, expected.low, expected.high)
    # Only two of the four have answers.
    assert one(rows, "ours", "all", "accuracy").value == 0.5
    assert one(rows, "ours", "all", "accuracy").full_share == pytest.approx(0.3)
    assert {row.task for row in rows} == {"prose", "needle", "all"}


def test_one_task_alone_has_no_row_for_all() -> None:
    assert {row.task for row in summarise(PROSE)} == {"prose"}


def test_a_method_that_misses_a_task_is_left_out_there_and_the_task_out_of_all() -> None:
    partly = [
        prompt("code", 0, full=FULL, ours=FULL, extra=FULL),
        prompt("code", 1, full=FULL, ours=FULL, extra=FULL),
        prompt("copying", 0, full=FULL, ours=FULL, extra=FULL),
        # Interrupted: a method is missing on one prompt of the task.
        prompt("poems", 0, full=FULL, ours=FULL, extra=FULL),
        prompt("poems", 1, full=FULL, ours=FULL),
    ]
    rows = summarise([*PROSE, *partly])
    tasks = {name: {row.task for row in rows if row.method == name} for name in ("full", "ours", "extra")}
    assert tasks["extra"] == {"code", "copying", "all"}
    assert tasks["full"] == tasks["ours"] == {"prose", "code", "copying", "poems", "all"}
    assert one(rows, "ours", "all", "kl").value == 0


def test_kl_is_compared_on_the_prompts_that_both_methods_ran_on() -> None:
    def kl(value: float) -> Outcome:
        return answered(1.0, kl=value)

    outcomes = [
        prompt("needle", 0, full=kl(0), ours=kl(1), theirs=kl(2), rare=kl(4)),
        prompt("needle", 1, full=kl(0), ours=kl(3), theirs=kl(4)),
        prompt("needle", 2, full=kl(0), theirs=kl(99)),
    ]
    shares = kl_shares(outcomes, "ours")
    assert shares == {
        "theirs": bootstrap_ratio(np.array([1.0, 3.0]), np.array([2.0, 4.0])),
        "rare": bootstrap_ratio(np.array([1.0]), np.array([4.0])),
    }
    assert (shares["theirs"].value, shares["rare"].value) == (pytest.approx(2 / 3), 0.25)


def test_full_attention_can_do_a_task_where_it_beats_guessing_by_a_quarter() -> None:
    def scores(*values: float) -> list[PromptOutcome]:
        return [prompt("needle", i, full=answered(value), ours=answered(1.0)) for i, value in enumerate(values)]

    assert can_do(scores(0.5, 0.5), chance=0.25)
    assert not can_do(scores(0.5, 0.375), chance=0.25)
    assert can_do(scores(0.0, 0.5), chance=0.0)
    assert can_do(PROSE, chance=0.9)


def test_curves_are_means_step_by_step_as_far_as_all_prompts_of_a_task_reach() -> None:
    outcomes = [*PROSE, *NEEDLE, prompt("code", 0, full=FULL)]
    assert curves(outcomes, ["ours", "full"]) == {
        "prose": {"ours": [2.5, 4.5], "full": [0, 0]},
        "needle": {"ours": [0], "full": [0]},
        "code": {"full": [0, 0]},
    }


def test_rows_are_json_rounded_to_six_digits() -> None:
    row = Row("ours", "prose", "kl", 1 / 3, 0.0, 1.0, 0.1234567, 1.0)
    assert json.loads(json.dumps(rows_to_json([row]))) == [
        {
            "method": "ours",
            "task": "prose",
            "measure": "kl",
            "value": 0.333333,
            "low": 0.0,
            "high": 1.0,
            "full_share": 0.123457,
            "read_share": 1.0,
        }
    ]


@pytest.mark.parametrize(
    ("n_right", "n_wrong", "is_there"), [(1, 1, False), (5, 5, False), (40, 40, True), (4, 1, False)]
)
def test_what_is_kept_over_all_tasks_is_there_where_no_resample_misses_what_full_attention_can_do(
    n_right: int, n_wrong: int, is_there: bool
) -> None:
    right = [prompt("needle", i, full=answered(1.0), ours=answered(0.5)) for i in range(n_right)]
    wrong = [prompt("words", i, full=answered(0.0), ours=answered(0.0)) for i in range(n_wrong)]
    rows = summarise([*right, *wrong])
    assert all(np.isfinite([row.value, row.low, row.high]).all() for row in rows)
    kept = [row for row in rows if (row.method, row.task, row.measure) == ("ours", "all", "accuracy_kept")]
    assert [row.value for row in kept] == ([0.5] if is_there else [])
