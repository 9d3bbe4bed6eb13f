"""Which kinds there are, of policies and of whatever else is named in JSON: built-in and registered by packages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

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

T = TypeVar("T")

ENTRY_POINT_GROUP = "recycler.policies"


@dataclass(frozen=True)
class Kinds(Generic[T]):
    """Classes by their `kind`.

    Attributes:
        word: What one of them is called.
        base: Their base class.
        group: Entry points of packages that bring more.
        built_in: Those that are here.
    """

    word: str
    # Abstract, which `type[T]` is not.
    base: type[Any]
    group: str
    built_in: tuple[type[T], ...]

    def names(self) -> list[str]:
        """Names that `named` accepts, sorted."""
        own = {one.kind for one in self.built_in}  # type: ignore[attr-defined]
        return sorted(own | {entry.name for entry in entry_points(group=self.group)})

    def named(self, kind: str) -> type[T]:
        """The class behind a kind; a plug-in is imported only when its kind is asked for.

        Raises:
            ValueError: If no built-in kind and no plug-in has that name, or the plug-in is no such class of that kind.
        """
        for one in self.built_in:
            if one.kind == kind:  # type: ignore[attr-defined]
                return one
        for entry in entry_points(group=self.group):
            if entry.name == kind:
                loaded = entry.load()
                if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
                    raise ValueError(f"entry point {entry.value} for {kind!r} is not a {self.base.__name__} class.")
                if getattr(loaded, "kind", None) != kind:
                    raise ValueError(
                        f"entry point {entry.value} is registered as {kind!r} but its kind is "
                        f"{getattr(loaded, 'kind', None)!r}; the two must agree."
                    )
                return loaded
        raise ValueError(f"unknown {self.word} kind {shown(kind)}: known are {', '.join(self.names())}.")


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


POLICIES: Kinds[StepPolicy] = Kinds("policy", StepPolicy, ENTRY_POINT_GROUP, BUILT_IN)
known_kinds, policy_class = POLICIES.names, POLICIES.named
