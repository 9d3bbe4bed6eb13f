"""Policies, and rules that end rounds, as plain JSON values and back."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from policies.base import StepPolicy
from policies.registry import POLICIES, Kinds
from policies.shown import shown
from policies.stops.base import StopRule
from policies.stops.registry import RULES

T = TypeVar("T")


def policy_to_json(policy: StepPolicy) -> dict[str, Any]:
    """`{"kind": ..., field: value, ...}` with inner policies nested; numbers, strings and lists only."""
    return _kind_to_json(policy)


def policy_from_json(values: Any) -> StepPolicy:
    """The policy that `policy_to_json` wrote.

    Raises:
        ValueError: On an unknown kind, a missing or unknown field, or a value that the policy refuses.
    """
    return _kind_from_json(values, POLICIES)


def stop_to_json(rule: StopRule) -> dict[str, Any]:
    """The same of a rule that ends rounds."""
    return _kind_to_json(rule)


def stop_from_json(values: Any) -> StopRule:
    """The rule that `stop_to_json` wrote; errors as of `policy_from_json`."""
    return _kind_from_json(values, RULES)


def _kind_to_json(of_kind: Any) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(of_kind) if field.init]
    return {"kind": of_kind.kind} | {field.name: _to_json(getattr(of_kind, field.name)) for field in fields}


def _kind_from_json(values: Any, kinds: Kinds[T]) -> T:
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise ValueError(f'a {kinds.word} must be an object with a "kind".')
    kind, found = values["kind"], kinds.named(values["kind"])
    fields = {field.name: field for field in dataclasses.fields(found) if field.init}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if name != "kind"}
    for name in given:
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"{kinds.word} {kind!r} has no field {shown(name)}: its fields are {known}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{kinds.word} {kind!r} lacks its field {name!r}.")
    try:
        return found(**{name: _from_json(value) for name, value in given.items()})
    except TypeError as error:
        raise ValueError(f"{kinds.word} {kind!r} has a field of the wrong type: {error}.") from error


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
