"""Which kinds of policy there are: the built-in ones and those that installed packages register."""

from __future__ import annotations

from importlib.metadata import entry_points

from policies.base import StepPolicy
from policies.budget_constrained import BudgetConstrained
from policies.constant import AlwaysFull, NeverFull
from policies.cosine_threshold import CosineThreshold
from policies.fixed_stride import FixedStride
from policies.layer_cosine import LayerCosine
from policies.learned_logistic import LearnedLogistic
from policies.max_age import MaxAge
from policies.random_refresh import RandomRefresh
from policies.refresh_keys import RefreshKeys
from policies.sentence_boundary import SentenceBoundary
from policies.shown import shown

ENTRY_POINT_GROUP = "recycler.policies"

BUILT_IN: tuple[type[StepPolicy], ...] = (
    AlwaysFull,
    NeverFull,
    FixedStride,
    CosineThreshold,
    LayerCosine,
    SentenceBoundary,
    RandomRefresh,
    LearnedLogistic,
    MaxAge,
    BudgetConstrained,
    RefreshKeys,
)


def known_kinds() -> list[str]:
    """Names that `policy_class` accepts, sorted."""
    built_in = {policy.kind for policy in BUILT_IN}
    return sorted(built_in | {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def policy_class(kind: str) -> type[StepPolicy]:
    """The class behind a kind; a plug-in is imported only when its kind is asked for.

    Raises:
        ValueError: If no built-in kind and no plug-in has that name, or the plug-in is no `StepPolicy` of that kind.
    """
    for policy in BUILT_IN:
        if policy.kind == kind:
            return policy
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == kind:
            loaded = entry.load()
            if not (isinstance(loaded, type) and issubclass(loaded, StepPolicy)):
                raise ValueError(f"entry point {entry.value} for {kind!r} is not a StepPolicy class.")
            if getattr(loaded, "kind", None) != kind:
                raise ValueError(
                    f"entry point {entry.value} is registered as {kind!r} but its kind is "
                    f"{getattr(loaded, 'kind', None)!r}; the two must agree."
                )
            return loaded
    raise ValueError(f"unknown policy kind {shown(kind)}: known are {', '.join(known_kinds())}.")
