"""Digests of trials: what was kept of a search, and edited since, is not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

_SHARE, _DIGEST = "full_share", "digest"


def trial_attributes(params: Mapping[str, Any], loss: float, full_share: float) -> dict[str, Any]:
    """What is kept of a trial beside its point and its loss: its full share in replay, and a digest of all three."""
    told = json.dumps([sorted(params.items()), loss, full_share])
    return {_SHARE: full_share, _DIGEST: hashlib.sha256(told.encode()).hexdigest()}


def is_as_written(trial: FrozenTrial) -> bool:
    """Whether a complete trial is what the search kept: a digest tells slips, and is no signature."""
    attributes, loss = trial.user_attrs, trial.value
    share = attributes.get(_SHARE)
    if loss is None or not isinstance(share, float):
        return False
    return bool(attributes == trial_attributes(trial.params, loss, share))
