"""The policy file of a tuning result: the exported policy and where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from policies import PolicyFile
from traces import TraceFile
from tuning.confirm.results import TuningResult
from tuning.report.result_rows import kl_share


def policy_file(
    result: TuningResult, tuned_on: Sequence[TraceFile], seed: int, weights: str | None = None
) -> PolicyFile:
    """Make the file that `recycler.generate` reads.

    Args:
        result: Its first family is exported.
        tuned_on: Traces of the tuning prompts.
        seed: Of prompts and search.
        weights: Digest of the model's weights, as `weights_sample` makes it; None leaves it out.
    """
    best = result.best
    ratio = kl_share(result, best.measured)
    provenance: dict[str, Any] = {
        "family": best.family,
        "parameters": dict(best.parameters),
        "budget": result.budget,
        "seed": seed,
        "traces": [file.digest() for file in tuned_on],
        "replay": {
            "full_share": best.measured.replay_full_share,
            "recovered_mass": best.measured.recovered_mass,
        },
        "closed_loop": {
            "prompts": list(result.prompt_names),
            "steps": result.n_steps,
            "full_share": best.measured.full_share,
            "kl": dataclasses.asdict(best.measured.kl),
            "kl_share_of_fixed_stride": ratio and dataclasses.asdict(ratio),
            "agreement": dataclasses.asdict(best.measured.agreement),
        },
    }
    if weights is not None:
        provenance["weights"] = weights
    if result.certificate is not None:
        provenance["certificate"] = result.certificate.to_json()
    return PolicyFile(
        policy=best.measured.policy,
        selection=result.selection,
        model=result.model,
        horizon_steps=result.n_steps,
        provenance=provenance | {"versions": dict(result.versions)},
    )
