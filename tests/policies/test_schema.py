from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import policies
from policies import ModelShape, policy_class
from policies.registry import BUILT_IN
from policies.schema import policy_file_problem, policy_file_schema

PUBLISHED = Path(policies.__file__).with_name("policy.schema.json")


def test_the_published_schema_is_what_the_command_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "policies"], capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == 1
    assert json.loads(printed) == policy_file_schema()
    remedy = "run: python -m policies | python -m json.tool --indent 1 > policies/policy.schema.json"
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == policy_file_schema(), remedy


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(policy_file_schema())


@pytest.mark.parametrize("kind", [policy.kind for policy in BUILT_IN])
def test_every_built_in_kind_is_described_and_closed(kind: str) -> None:
    described = policy_file_schema()["$defs"][kind]
    assert described["description"] == (policy_class(kind).__doc__ or "").splitlines()[0]
    assert described["additionalProperties"] is False


def test_a_kind_that_the_schema_does_not_know_passes_as_a_plug_in(model: ModelShape) -> None:
    # Another program validates without knowing what is installed here.
    values = {
        "format": 1,
        "policy": {"kind": "somebody_elses", "anything": [1, 2]},
        "selection": {"k": 64},
        "model": {"id": "tiny", "layers": 2, "kv_heads": 3, "query_heads": 6, "head_dim": 8},
    }
    jsonschema.Draft202012Validator(policy_file_schema()).validate(values)
    assert "unknown policy kind 'somebody_elses'" in (policy_file_problem(values) or "")
    assert policy_file_problem(values | {"policy": {"kind": "always_full"}}) is None
