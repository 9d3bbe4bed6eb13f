from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from traces.reporting.estimate import Estimate
from tuning.confirm.results import TuningResult
from tuning.report.result_rows import Role, compact, interval, kl_share, nats, percent, result_rows, share_of_baseline


def test_rows_are_families_then_baseline_then_references(report_result: TuningResult) -> None:
    rows = result_rows(report_result)
    roles = [row.role for row in rows]
    assert roles == [Role.EXPORTED, *[Role.FAMILY] * 5, Role.BASELINE, *[Role.REFERENCE] * 4]
    assert [row.label for row in rows[:6]] == [family.family for family in report_result.families]
    assert [row.tune_kl is None for row in rows] == [False] * 6 + [True] * 5
    assert rows[0].kl_share == report_result.kl_ratio(report_result.best.measured)


def test_parameters_are_what_the_search_chose_or_what_the_policy_is_made_of(report_result: TuningResult) -> None:
    rows = {row.label: row.parameters for row in result_rows(report_result)}
    assert rows["cosine_threshold"] == "asked=1.02 check_every=2"
    assert rows["learned_logistic"].startswith("refresh_churn=no positive_share=0.221")
    assert rows["fixed stride 10"] == "stride=10"


def test_parameters_of_wrapped_policies_and_of_units_are_named(report_result: TuningResult) -> None:
    policy = report_result.families[2].measured.policy
    result = replace(report_result, baseline=replace(report_result.baseline, policy=policy))
    baseline = next(row for row in result_rows(result) if row.role is Role.BASELINE)
    assert baseline.parameters == "stride=per unit budget=0.1"


@pytest.mark.parametrize(
    ("value", "spelled"),
    [(0.0, "0.000"), (1.23456, "1.235"), (0.01, "0.010"), (0.00123, "0.0012"), (3.2e-7, "3.2e-07")],
)
def test_small_kls_keep_two_digits(value: float, spelled: str) -> None:
    assert nats(value) == spelled


@pytest.mark.parametrize(("share", "spelled"), [(0, "0%"), (1, "100%"), (0.9996, "100.0%"), (0.0981, "9.8%")])
def test_only_a_whole_share_has_no_decimal(share: float, spelled: str) -> None:
    assert percent(share) == spelled


def test_an_interval_has_one_percent_sign() -> None:
    assert interval(Estimate(0.5, 0.4, 0.6), percent) == "40.0-60.0%"
    assert interval(Estimate(0.5, 0.4, 0.6), nats, " to ") == "0.400 to 0.600"


def test_parameters_keep_three_digits() -> None:
    assert compact({"a": 0.123456, "b": 7, "c": True, "d": "x", "e": np.float64(2)}) == "a=0.123 b=7 c=yes d=x e=2"


@pytest.mark.parametrize(
    ("factor", "start"),
    [
        (0.4, "40% (95% interval 40 to 40%) of that of fixed stride 10"),
        (1.0, "not clearly different from that of fixed stride 10 at the same budget: 100%"),
        (1.5, "worse, 150% (95% interval 150 to 150%) of that of"),
    ],
)
def test_the_comparison_says_no_more_than_the_interval(report_result: TuningResult, factor: float, start: str) -> None:
    measured = replace(report_result.best.measured, prompt_kl=factor * report_result.baseline.prompt_kl)
    result = replace(report_result, families=[replace(report_result.best, measured=measured)])
    assert share_of_baseline(result, result_rows(result)[0]).startswith(start)


def test_nothing_is_a_share_of_no_kl(report_result: TuningResult) -> None:
    result = replace(report_result, baseline=replace(report_result.baseline, prompt_kl=np.zeros(12)))
    assert kl_share(result, result.best.measured) is None
    assert "nothing to compare with" in share_of_baseline(result, result_rows(result)[0])
