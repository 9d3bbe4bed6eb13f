"""What to do at a decode step: policies, their signals, and the policy JSON."""

from policies.base import StepPolicy
from policies.budget_constrained import BudgetConstrained
from policies.constant import AlwaysFull, NeverFull
from policies.cosine_threshold import CosineThreshold
from policies.features import FEATURES, Feature
from policies.fixed_stride import FixedStride
from policies.layer_cosine import LayerCosine
from policies.learned_logistic import LearnedLogistic
from policies.max_age import MaxAge
from policies.per_unit import PerUnit, as_per_unit
from policies.policy_file import ModelShape, PolicyFile, check_fits
from policies.program import SIGNALS, NotAProgram, Op, PolicyProgram, policy_program
from policies.random_refresh import RandomRefresh
from policies.refresh_keys import RefreshKeys
from policies.registry import known_kinds, policy_class
from policies.schedule import Schedule
from policies.selection import GroupPooling, Ranking, Selection
from policies.sentence_boundary import SentenceBoundary
from policies.serialize import policy_from_json, policy_to_json
from policies.signals import MEASURED_SIGNALS, QUERY_SIGNALS, StepSignals
from policies.version import project_version, written_by

__all__ = [
    "FEATURES",
    "MEASURED_SIGNALS",
    "QUERY_SIGNALS",
    "SIGNALS",
    "AlwaysFull",
    "BudgetConstrained",
    "CosineThreshold",
    "Feature",
    "FixedStride",
    "GroupPooling",
    "LayerCosine",
    "LearnedLogistic",
    "MaxAge",
    "ModelShape",
    "NeverFull",
    "NotAProgram",
    "Op",
    "PerUnit",
    "PolicyFile",
    "PolicyProgram",
    "RandomRefresh",
    "Ranking",
    "RefreshKeys",
    "Schedule",
    "Selection",
    "SentenceBoundary",
    "StepPolicy",
    "StepSignals",
    "as_per_unit",
    "check_fits",
    "known_kinds",
    "policy_class",
    "policy_from_json",
    "policy_program",
    "policy_to_json",
    "project_version",
    "written_by",
]
