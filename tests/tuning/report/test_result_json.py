from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import policy_from_json
from tuning.confirm.results import TuningResult
from tuning.report.files import write_results
from tuning.report.result_json import result_to_json


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_all_values_are_plain_and_finite(report_result: TuningResult) -> None:
    values = result_to_json(report_result)
    # Null is how a selection without sizes says so.
    assert values["selection"].pop("unit_k") is None
    assert {type(leaf) for leaf in leaves(values)} <= {str, int, float, bool}
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_every_policy_is_there_with_all_that_was_measured(report_result: TuningResult) -> None:
    values = result_to_json(report_result)
    assert values["exported"] == values["families"][0]["family"] == "logistic_profile"
    assert [family["label"] for family in values["families"]] == [f.family for f in report_result.families]
    assert len(values["references"]) == 4
    found = values["families"][1]
    family = report_result.families[1]
    measured = family.measured
    assert found["parameters"] == family.parameters
    assert found["full_share"] == measured.full_share
    assert found["kl"] == {"value": measured.kl.value, "low": measured.kl.low, "high": measured.kl.high}
    assert found["kl_share_of_baseline"]["value"] == report_result.kl_ratio(measured).value
    assert found["agreement"]["low"] == measured.agreement.low
    assert found["kl_by_kind"] == report_result.kl_by_kind(measured)
    assert found["per_prompt"]["kl"] == measured.prompt_kl.tolist()
    assert found["unit_full_share"] == measured.unit_full_share.tolist()
    assert found["trials"]["loss"] == family.trials[:, 1].tolist()
    assert found["tuning_kl"] == family.tune_kl


def test_every_policy_that_was_tested_has_its_certificate(
    ladder_result: TuningResult, report_result: TuningResult
) -> None:
    values = result_to_json(ladder_result)
    assert ladder_result.ladder is not None
    assert [rung["certificate"] for rung in values["ladder"]] == [
        rung.certificate.to_json() for rung in ladder_result.ladder.rungs
    ]
    assert [rung["certificate"]["certified"] for rung in values["ladder"]] == [True, True, False, False]
    labels = {one["label"] for one in (*values["families"], *values["references"])}
    assert {rung["label"] for rung in values["ladder"]} <= labels
    assert values["families"][0]["tuning_kl"] is None
    assert "ladder" not in result_to_json(report_result)


def test_policies_and_prompts_can_be_read_back(report_result: TuningResult) -> None:
    values = result_to_json(report_result)
    assert policy_from_json(values["families"][0]["policy"]) == report_result.best.measured.policy
    assert values["held_out_prompts"][0] == {"name": report_result.prompt_names[0], "kind": "prose"}
    assert values["tuning_prompts"] == list(report_result.tune_names)
    assert values["selection"]["group"] == "max"
    assert (values["model"]["layers"], values["model"]["kv_heads"]) == (30, 3)


def test_what_is_no_number_is_null(report_result: TuningResult) -> None:
    best = replace(report_result.best.measured, recovered_mass=float("nan"), prompt_accuracy=np.full(12, np.nan))
    result = replace(
        report_result,
        families=[replace(report_result.best, measured=best, tune_kl=float("inf"))],
        baseline=replace(report_result.baseline, prompt_kl=np.zeros(12)),
    )
    found = result_to_json(result)["families"][0]
    assert found["replay"]["recovered_mass"] is None
    assert found["per_prompt"]["accuracy"] == [None] * 12
    assert found["tuning_kl"] is None
    assert found["kl_share_of_baseline"] is None


def test_the_file_holds_the_values(report_folder: Path, report_result: TuningResult) -> None:
    assert json.loads((report_folder / "results.json").read_text()) == result_to_json(report_result)


def test_a_write_that_fails_leaves_the_file_that_was_there(
    report_result: TuningResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_results(report_result, tmp_path / "new")
    before = path.read_bytes()

    def refuse(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"{")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="no space"):
        write_results(report_result, tmp_path / "new")
    assert path.read_bytes() == before
