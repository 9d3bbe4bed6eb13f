"""Policies as plain JSON values and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from policies.base import StepPolicy
from policies.registry import policy_class
from policies.shown import shown


def policy_to_json(policy: StepPolicy) -> dict[str, Any]:
    """`{"kind": ..., field: value, ...}` with inner policies nested; numbers, strings and lists only."""
    fields = [field for field in dataclasses.fields(policy) if field.init]  # type: ignore[arg-type]
    return {"kind": policy.kind} | {field.name: _to_json(getattr(policy, field.name)) for field in fields}


def policy_from_json(values: Any) -> StepPolicy:
    """The policy that `policy_to_json` wrote.

    Raises:
        ValueError: On an unknown kind, a missing or unknown field, or a value that the policy refuses.
    """
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise ValueError('a policy must be an object with a "kind".')
    policy = policy_class(values["kind"])
    fields = {field.name: field for field in dataclasses.fields(policy) if field.init}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if name != "kind"}
    for name in given:
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"policy {policy.kind!r} has no field {shown(name)}: its fields are {known}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"policy {policy.kind!r} lacks its field {name!r}.")
    try:
        return policy(**{name: _from_json(value) for name, value in given.items()})
    except TypeError as error:
        raise ValueError(f"policy {policy.kind!r} has a field of the wrong type: {error}.") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, StepPolicy):
        return policy_to_json(value)
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return policy_from_json(value)
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return value
