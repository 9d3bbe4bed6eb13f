"""The families of policies that `optimize` knows."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from tuning.families.cosine import CosineProfile, SharedCosine
from tuning.families.family import Family
from tuning.families.logistic import LogisticProfile, SharedLogistic
from tuning.families.stride import SharedStride, StrideProfile

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            SharedStride(),
            SharedCosine(),
            SharedLogistic(),
            StrideProfile(),
            CosineProfile(),
            LogisticProfile(),
        )
    }
)


def families_named(names: Sequence[str]) -> list[Family]:
    """Families by name; all of them if no name is given.

    Raises:
        ValueError: If a name is unknown, listing the known ones.
    """
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"unknown family {name!r}: known are {', '.join(FAMILIES)}.")
    return [FAMILIES[name] for name in dict.fromkeys(names)] if names else list(FAMILIES.values())
