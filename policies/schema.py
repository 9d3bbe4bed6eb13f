"""The JSON Schema of policy files: `python -m policies` prints it.

The copy beside this module, `policy.schema.json`, is what other languages read; a test keeps the two the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from policies.registry import BUILT_IN, policy_class
from policies.selection import GroupPooling, Ranking
from policies.stops.registry import RULES

_TYPES: dict[str, dict[str, Any]] = {
    "StepPolicy": {"$ref": "#/$defs/policy"},
    "PerUnit": {"$ref": "#/$defs/per_unit"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "tuple[str, ...]": {"type": "array", "items": {"type": "string"}},
    "tuple[float, ...]": {"type": "array", "items": {"type": "number"}},
    "tuple[int, ...]": {"type": "array", "items": {"type": "integer"}},
    "tuple[PerUnit, ...]": {"type": "array", "items": {"$ref": "#/$defs/per_unit"}},
}


_EVERY_KIND: tuple[type[Any], ...] = (*BUILT_IN, *RULES.built_in)

# Of policy files that are read; the last is written. Format 1, of 0.1, has no horizon.
FORMATS = (1, 2)


def policy_file_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy file; kinds that it does not know pass as plug-ins."""
    tokens = {"type": "integer", "minimum": 0}
    count = {"type": "integer", "minimum": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recycled attention policy",
        "type": "object",
        "required": ["format", "policy", "selection", "model"],
        "additionalProperties": False,
        "properties": {
            "format": {"enum": list(FORMATS)},
            "horizon_steps": {
                "description": "Decode steps of the outputs that the policy was tuned on; null if that is not known.",
                "oneOf": [count, {"type": "null"}],
            },
            "policy": {"$ref": "#/$defs/policy"},
            "stop": {
                "description": "When a round of exact decoding ends; null if that was not tuned.",
                "oneOf": [{"$ref": "#/$defs/stop"}, {"type": "null"}],
            },
            "selection": {
                "type": "object",
                "required": ["k"],
                "additionalProperties": False,
                "properties": {
                    "k": count,
                    "sinks": tokens,
                    "window": tokens,
                    "pool_backward": tokens,
                    "pool_forward": tokens,
                    "group": {"enum": [str(choice) for choice in GroupPooling]},
                    "ranking": {"enum": [str(choice) for choice in Ranking]},
                    "score_decay": {"type": "number", "minimum": 0, "maximum": 1},
                    "prompt_queries": {"oneOf": [count, {"type": "null"}]},
                    "unit_k": {
                        "description": "Most tokens of each unit's set: a row per layer and a column per KV head.",
                        "type": ["array", "null"],
                        "minItems": 1,
                        "items": {"type": "array", "minItems": 1, "items": count},
                    },
                },
            },
            "model": {
                "type": "object",
                "required": ["id", "layers", "kv_heads", "query_heads", "head_dim"],
                "additionalProperties": False,
                "properties": {
                    "id": {"type": "string"},
                    "layers": count,
                    "kv_heads": count,
                    "query_heads": count,
                    "head_dim": count,
                },
            },
            "provenance": {"type": "object", "properties": {"written_by": {"type": "string"}}},
            "digest": {
                "description": "Of all else, as it was written (`policies.policy_file.digest_of`); may be left out.",
                "type": "string",
            },
        },
        "$defs": {
            "per_unit": {
                "description": "One number, or a table with a row per layer and a column per KV head.",
                "oneOf": [
                    {"type": "number"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "array", "minItems": 1, "items": {"type": "number"}},
                    },
                ],
            },
            "policy": _any_kind(BUILT_IN),
            "stop": _any_kind(RULES.built_in),
            **{one.kind: _kind_schema(one) for one in _EVERY_KIND},
        },
    }


def policy_file_problem(values: Any) -> str | None:
    """What is wrong with the contents of a policy file, in one sentence; None if nothing is."""
    if isinstance(values, dict) and isinstance(values.get("policy"), dict):
        try:
            _check_kinds(values["policy"])
            if isinstance(values.get("stop"), dict) and isinstance(values["stop"].get("kind"), str):
                RULES.named(values["stop"]["kind"])
        except ValueError as error:
            return str(error)
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] not in FORMATS:
        return f"it is of format {values['format']}, and this version reads formats {' and '.join(map(str, FORMATS))}."
    # Where policies only decide, as in a decoder on somebody else's GPU machine, it need not be installed.
    import jsonschema

    validator = jsonschema.Draft202012Validator(policy_file_schema())
    mismatch = jsonschema.exceptions.best_match(validator.iter_errors(values))
    if mismatch is None:
        return None
    place = "/".join(str(part) for part in mismatch.absolute_path) or "the file"
    return f"not a policy file: {place}: {mismatch.message}."


def _check_kinds(values: dict[str, Any]) -> None:
    if isinstance(values.get("kind"), str):
        policy_class(values["kind"])
    for value in values.values():
        if isinstance(value, dict):
            _check_kinds(value)


def _any_kind(built_in: tuple[type[Any], ...]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"type": "string"}},
        "allOf": [
            {"if": {"properties": {"kind": {"const": one.kind}}}, "then": {"$ref": f"#/$defs/{one.kind}"}}
            for one in built_in
        ],
    }


def _kind_schema(policy: type) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(policy) if field.init]
    return {
        "description": (policy.__doc__ or "").strip().splitlines()[0],
        "type": "object",
        "required": [
            "kind",
            *(field.name for field in fields if field.default is dataclasses.MISSING),
        ],
        "additionalProperties": False,
        "properties": {"kind": {"type": "string"}} | {field.name: _TYPES[str(field.type)] for field in fields},
    }
