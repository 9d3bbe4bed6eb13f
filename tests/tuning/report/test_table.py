from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tuning.confirm.results import TuningResult
from tuning.report.table import print_table

MakeResult = Callable[..., TuningResult]


def printed(result: TuningResult, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(text: str, label: str) -> list[list[str]]:
    return [line.removeprefix(label).split() for line in text.splitlines() if line.startswith(label + " ")]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_family_and_the_baseline_have_a_row_in_both_tables(report_result: TuningResult, width: int) -> None:
    text = printed(report_result, width)
    for label in (*(family.family for family in report_result.families), "fixed stride 10"):
        assert len(rows_of(text, label)) == 2
    assert "at 0.05" not in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_cut_off(report_result: TuningResult, width: int) -> None:
    text = printed(report_result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for word in ("phase_between_units=7", "regularisation=0.0341", "key_values", "token"):
        assert word in text


def test_only_the_exported_family_is_marked(report_result: TuningResult) -> None:
    text = printed(report_result)
    assert [line.split(" *")[0] for line in text.splitlines() if " * " in line] == ["logistic_profile"] * 2
    assert "* exported" in text


def test_a_row_holds_what_was_measured(report_result: TuningResult) -> None:
    measured = report_result.families[1].measured
    share = report_result.kl_ratio(measured)
    values, kinds = rows_of(printed(report_result), "cosine_profile")
    assert values == [
        f"{measured.replay_full_share:.1%}",
        f"{measured.full_share:.1%}",
        f"{measured.recovered_mass:.3f}",
        f"{measured.kl.value:.3f}",
        f"{share.value:.0%}",
        f"{measured.agreement.value:.1%}",
    ]
    assert kinds == [f"{kl:.3f}" for kl in report_result.kl_by_kind(measured).values()]
    text = printed(report_result)
    for ends in (
        f"{measured.kl.low:.3f}-{measured.kl.high:.3f}",
        f"{100 * share.low:.0f}-{100 * share.high:.0f}%",
        f"{100 * measured.agreement.low:.1f}-{100 * measured.agreement.high:.1f}%",
    ):
        assert ends in text


def test_the_title_says_what_was_run(report_result: TuningResult) -> None:
    assert printed(report_result).startswith(
        "SmolLM2-135M-Instruct, k = 128 tokens, budget 10%, 12 held-out prompts x 64 steps"
    )


def test_piped_output_is_plain(report_result: TuningResult) -> None:
    assert "\x1b" not in printed(report_result)


def test_names_are_not_taken_for_markup(report_result: TuningResult) -> None:
    best = replace(report_result.best.measured, label="[red]best[/red]")
    result = replace(
        report_result,
        model=replace(report_result.model, id="[bold]tiny[/bold]"),
        families=[replace(report_result.best, measured=best)],
        prompt_kinds=["[/x]"] * 12,
    )
    text = printed(result)
    for name in ("[red]best[/red] *", "[bold]tiny[/bold],", "[/x]"):
        assert name in text


def test_one_family_one_prompt_one_kind(make_report_result: MakeResult) -> None:
    text = printed(make_report_result(families=("fixed_stride",), kinds={"user": 0.3}, n_per_kind=1), 80)
    assert "1 held-out prompt x" in text
    assert len(rows_of(text, "fixed_stride")) == 2


def test_a_baseline_without_kl_has_no_shares(report_result: TuningResult) -> None:
    text = printed(replace(report_result, baseline=replace(report_result.baseline, prompt_kl=np.zeros(12))))
    assert rows_of(text, "cosine_profile")[0][4] == "-"


@pytest.mark.parametrize("width", [80, 120])
def test_a_certificate_has_a_table_of_its_own(ladder_result: TuningResult, width: int) -> None:
    text = printed(ladder_result, width)
    assert ladder_result.ladder is not None
    assert max(len(line) for line in text.splitlines()) <= width
    certified = [line.split()[-1] for line in text.splitlines() if " of 36 " in line]
    assert certified == ["yes", "yes", "no", "no"]
    top = ladder_result.ladder.rungs[0]
    (row,) = (line for line in text.splitlines() if line.startswith("logistic_profile at 0.5"))
    assert row.split()[3:5] == [f"{top.prompt_kl.mean():.3f}", f"{top.certificate.kl_bound:.3f}"]
    assert str(ladder_result.certificate) in " ".join(text.split())


def test_without_a_certificate_there_is_no_word_of_one(report_result: TuningResult) -> None:
    assert "certif" not in printed(report_result)
