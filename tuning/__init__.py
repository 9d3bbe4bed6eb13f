"""Learning and tuning policies from traces."""

from traces.reporting.estimate import Estimate
from tuning.certify.certificate import Certificate, KlLimit, certify
from tuning.confirm.results import TuningResult
from tuning.divide.allocation import allocate
from tuning.divide.calibration import calibrate
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES, families_named
from tuning.families.family import Family
from tuning.families.fit import fit_logistic
from tuning.replay.run import Replay, replay_full_share, replay_policy
from tuning.replay.trace_batch import TraceBatch
from tuning.search.study import search_family

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

# For one version, paths of 0.1 such as tuning.hindsight are found in moved/, and warn.
__path__.append(f"{__path__[0]}/moved")
