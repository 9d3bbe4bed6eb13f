from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from traces.reporting.estimate import Estimate, bootstrap
from tuning.confirm.results import TuningResult


def test_measures_are_means_over_prompts(report_result: TuningResult) -> None:
    best = report_result.best
    assert best is report_result.families[0]
    assert best.measured.kl == bootstrap(best.measured.prompt_kl)
    assert best.measured.agreement == bootstrap(best.measured.prompt_agreement)
    assert best.measured.full_share == pytest.approx(best.measured.prompt_full_share.mean())


def test_the_baseline_is_all_of_itself(report_result: TuningResult) -> None:
    assert report_result.kl_ratio(report_result.baseline) == Estimate(1.0, 1.0, 1.0)


def test_kl_by_kind_keeps_the_order_of_the_kinds(report_result: TuningResult) -> None:
    kl = np.arange(12.0)
    result = replace(report_result, prompt_kinds=["b", "a", "c"] * 4)
    measured = replace(report_result.baseline, prompt_kl=kl)
    by_kind = result.kl_by_kind(measured)
    assert list(by_kind) == ["b", "a", "c"]
    assert by_kind == {"b": 4.5, "a": 5.5, "c": 6.5}


def test_a_result_certifies_what_it_exports(ladder_result: TuningResult, report_result: TuningResult) -> None:
    assert report_result.certificate is None
    assert ladder_result.ladder is not None
    assert ladder_result.certificate is ladder_result.ladder.rungs[1].certificate
    with pytest.raises(ValueError, match=r"logistic_profile is exported, but it is not what the ladder chooses"):
        replace(report_result, ladder=ladder_result.ladder)
