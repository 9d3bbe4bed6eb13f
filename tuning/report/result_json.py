"""A tuning result as plain numbers, for programs."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any

import numpy as np

from policies import policy_to_json
from traces.reporting.estimate import Estimate
from tuning.certify.ladder import Rung
from tuning.confirm.results import FamilyResult, Measured, TuningResult
from tuning.report.result_rows import kl_share


def result_to_json(result: TuningResult) -> dict[str, Any]:
    """Everything of a result as JSON values, prompts and units one by one; what is no finite number becomes None."""
    prompts = zip(result.prompt_names, result.prompt_kinds, strict=True)
    ladder = {} if result.ladder is None else {"ladder": [_rung(rung) for rung in result.ladder.rungs]}
    plain: dict[str, Any] = _plain(
        {
            "model": dataclasses.asdict(result.model),
            "selection": dataclasses.asdict(result.selection),
            "budget": result.budget,
            "steps_per_prompt": result.n_steps,
            "context_tokens": result.context_tokens,
            "held_out_prompts": [{"name": name, "kind": kind} for name, kind in prompts],
            "tuning_prompts": result.tune_names,
            "exported": result.best.family,
            "families": [_family(result, family) for family in result.families],
            "baseline": _measured(result, result.baseline),
            "references": [_measured(result, measured) for measured in result.references],
            "versions": result.versions,
        }
        | ladder
    )
    return plain


def _family(result: TuningResult, family: FamilyResult) -> dict[str, Any]:
    return {
        "family": family.family,
        "parameters": family.parameters,
        **_measured(result, family.measured),
        "tuning_kl": family.tune_kl,
        "trials": {"full_share": family.trials[:, 0], "loss": family.trials[:, 1]},
    }


def _measured(result: TuningResult, measured: Measured) -> dict[str, Any]:
    return {
        "label": measured.label,
        "policy": policy_to_json(measured.policy),
        "replay": {"full_share": measured.replay_full_share, "recovered_mass": measured.recovered_mass},
        "full_share": measured.full_share,
        "kl": _estimate(measured.kl),
        "kl_share_of_baseline": _estimate(kl_share(result, measured)),
        "agreement": _estimate(measured.agreement),
        "accuracy": measured.prompt_accuracy.mean(),
        "kl_by_kind": result.kl_by_kind(measured),
        "per_prompt": {
            "kl": measured.prompt_kl,
            "agreement": measured.prompt_agreement,
            "accuracy": measured.prompt_accuracy,
            "full_share": measured.prompt_full_share,
        },
        "unit_full_share": measured.unit_full_share,
    }


def _rung(rung: Rung) -> dict[str, Any]:
    return {"budget": rung.budget, "label": rung.label, "certificate": rung.certificate.to_json()}


def _estimate(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else dataclasses.asdict(estimate)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
