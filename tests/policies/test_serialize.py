from __future__ import annotations

import json
import re
from typing import Any

import pytest

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    known_kinds,
    policy_from_json,
    policy_to_json,
)


def test_a_policy_is_its_kind_and_its_fields() -> None:
    assert policy_to_json(AlwaysFull()) == {"kind": "always_full"}
    assert policy_to_json(FixedStride(((2, 3.5),), phase=1)) == {
        "kind": "fixed_stride",
        "stride": [[2, 3.5]],
        "phase": 1,
    }
    assert policy_to_json(LearnedLogistic(("age",), (0.5,), -3)) == {
        "kind": "learned_logistic",
        "features": ["age"],
        "weights": [0.5],
        "intercept": -3,
        "threshold": 0.5,
    }


def test_inner_policies_are_nested() -> None:
    policy = BudgetConstrained(MaxAge(CosineThreshold(0.85), 30), 0.1)
    assert policy_to_json(policy) == {
        "kind": "budget_constrained",
        "policy": {
            "kind": "max_age",
            "policy": {"kind": "cosine_threshold", "threshold": 0.85, "check_every": 1},
            "max_age": 30,
        },
        "budget": 0.1,
        "burst": 0,
    }
    assert policy_from_json(policy_to_json(policy)) == policy


def test_floats_come_back_to_the_last_bit() -> None:
    share = 0.1 + 0.2
    text = json.dumps(policy_to_json(BudgetConstrained(AlwaysFull(), ((share, 1 / 3),))))
    assert policy_from_json(json.loads(text)).budget == ((share, 1 / 3),)  # type: ignore[attr-defined]


def test_optional_fields_may_be_left_out() -> None:
    assert policy_from_json({"kind": "fixed_stride", "stride": 10}) == FixedStride(10)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("always_full", 'a policy must be an object with a "kind".'),
        ({"stride": 3}, 'a policy must be an object with a "kind".'),
        ({"kind": 3}, 'a policy must be an object with a "kind".'),
        ({"kind": "nope"}, f"unknown policy kind 'nope': known are {', '.join(known_kinds())}."),
        ({"kind": "fixed_stride"}, "policy 'fixed_stride' lacks its field 'stride'."),
        (
            {"kind": "fixed_stride", "stride": 3, "strid": 3},
            "policy 'fixed_stride' has no field 'strid': its fields are stride, phase.",
        ),
        ({"kind": "never_full", "age": 3}, "policy 'never_full' has no field 'age': its fields are none."),
        ({"kind": "fixed_stride", "stride": 0}, "stride must be at least 1, not 0."),
        (
            {"kind": "max_age", "policy": {"kind": "nope"}, "max_age": 3},
            f"unknown policy kind 'nope': known are {', '.join(known_kinds())}.",
        ),
    ],
)
def test_what_is_no_policy_is_refused_in_a_sentence(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        policy_from_json(values)


def test_a_field_of_a_wrong_type_is_refused_with_the_kind() -> None:
    with pytest.raises(ValueError, match="policy 'learned_logistic' has a field of the wrong type: "):
        policy_from_json({"kind": "learned_logistic", "features": ["age"], "weights": 3, "intercept": 0})
