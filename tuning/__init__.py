"""Learning and tuning policies from traces."""

from traces.estimate import Estimate
from tuning.allocation import allocate
from tuning.calibration import calibrate
from tuning.certificate import Certificate, KlLimit, certify
from tuning.families import FAMILIES, families_named
from tuning.family import Family
from tuning.fit import fit_logistic
from tuning.replay import Replay, replay_full_share, replay_policy
from tuning.results import TuningResult
from tuning.study import search_family
from tuning.trace_batch import TraceBatch
from tuning.tuning_data import TuningData

__all__ = [
    "FAMILIES",
    "Certificate",
    "Estimate",
    "Family",
    "KlLimit",
    "Replay",
    "TraceBatch",
    "TuningData",
    "TuningResult",
    "allocate",
    "calibrate",
    "certify",
    "families_named",
    "fit_logistic",
    "replay_full_share",
    "replay_policy",
    "search_family",
]
