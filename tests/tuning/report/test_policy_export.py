from __future__ import annotations

from policies import PolicyFile, policy_to_json, written_by
from tuning.confirm.results import TuningResult
from tuning.report.policy_export import policy_file


def test_the_exported_policy_is_the_best_family_and_names_what_made_it(report_result: TuningResult) -> None:
    file = policy_file(report_result, [], seed=3)
    values = file.to_json()
    assert values["policy"] == policy_to_json(report_result.best.measured.policy)
    assert (values["provenance"]["family"], values["provenance"]["seed"]) == (report_result.best.family, 3)
    assert values["provenance"]["versions"] == dict(report_result.versions)
    assert values["provenance"]["written_by"] == written_by()
    assert PolicyFile.from_json(values) == file
