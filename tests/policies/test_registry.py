from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from policies import (
    AlwaysFull,
    MaxAge,
    ModelShape,
    PolicyFile,
    Selection,
    StepPolicy,
    StepSignals,
    known_kinds,
    policy_class,
    policy_from_json,
    policy_to_json,
    registry,
)
from policies.arrays import Array

Install = Callable[..., None]

BUILT_IN = [
    "always_full",
    "budget_constrained",
    "cosine_threshold",
    "fixed_stride",
    "layer_cosine",
    "learned_logistic",
    "max_age",
    "never_full",
    "random_refresh",
    "refresh_keys",
    "sentence_boundary",
]


@dataclass(frozen=True)
class EveryOther(StepPolicy):
    """A policy of somebody else, with a field that it works out itself."""

    offset: int = 0
    period: int = dataclasses.field(default=2, init=False)
    kind: ClassVar[str] = "every_other"

    def decide(self, signals: StepSignals) -> Array:
        return (signals.step + self.offset) % self.period < 1


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes entry points of the plug-in group: names, each with the place of its class."""
    module = ModuleType("somebody_else")
    module.EveryOther = EveryOther  # type: ignore[attr-defined]
    module.decide = lambda signals: signals.age >= 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody_else", module)

    def install(**places: str) -> None:
        entries = [EntryPoint(name, place, "recycler.policies") for name, place in places.items()]
        monkeypatch.setattr(registry, "entry_points", lambda *, group: entries if group == entries[0].group else [])

    return install


class TestBuiltIn:
    def test_the_known_kinds_are_the_published_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda *, group: [])
        assert known_kinds() == BUILT_IN

    @pytest.mark.parametrize("kind", BUILT_IN)
    def test_a_kind_names_its_class(self, kind: str) -> None:
        assert policy_class(kind).kind == kind


class TestPlugIns:
    def test_a_plug_in_is_known_and_works_like_a_built_in_kind(
        self, install: Install, model: ModelShape, tmp_path: Path
    ) -> None:
        install(every_other="somebody_else:EveryOther")
        assert known_kinds() == sorted([*BUILT_IN, "every_other"])
        assert policy_class("every_other") is EveryOther
        policy = MaxAge(EveryOther(1), 5)
        assert policy_from_json(json.loads(json.dumps(policy_to_json(policy)))) == policy
        PolicyFile(policy, Selection(64), model).write(tmp_path / "policy.json")
        assert PolicyFile.read(tmp_path / "policy.json").policy == policy

    def test_fields_that_a_policy_works_out_itself_are_not_in_its_json(self) -> None:
        assert policy_to_json(EveryOther(1)) == {"kind": "every_other", "offset": 1}

    def test_an_unknown_field_of_a_plug_in_is_refused(self, install: Install, model: ModelShape) -> None:
        install(every_other="somebody_else:EveryOther")
        values = PolicyFile(AlwaysFull(), Selection(64), model).to_json()
        with pytest.raises(ValueError, match=r"'every_other' has no field 'period': its fields are offset\."):
            PolicyFile.from_json(values | {"policy": {"kind": "every_other", "period": 3}})

    def test_a_plug_in_of_another_kind_than_its_name_is_refused_with_both(self, install: Install) -> None:
        install(odd="somebody_else:EveryOther")
        with pytest.raises(ValueError, match="somebody_else:EveryOther is registered as 'odd' but its kind is 'every_"):
            policy_class("odd")

    @pytest.mark.parametrize("place", ["somebody_else:decide", "somebody_else", "json:JSONDecoder"])
    def test_a_plug_in_that_is_no_policy_is_refused_with_its_place(self, install: Install, place: str) -> None:
        install(odd=place)
        with pytest.raises(ValueError, match=f"entry point {place} for 'odd' is not a StepPolicy class"):
            policy_class("odd")

    def test_a_plug_in_cannot_take_the_name_of_a_built_in_kind(self, install: Install) -> None:
        install(always_full="somebody_else:EveryOther")
        assert policy_class("always_full") is AlwaysFull
        assert known_kinds() == BUILT_IN


class TestNothingIsImportedUnasked:
    @pytest.fixture(autouse=True)
    def no_imports(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        """An installed plug-in that must not be loaded, and an import machinery that refuses to."""
        install(every_other="no_such_module:EveryOther")

        class Refuse:
            def find_spec(self, name: str, *_: object) -> None:
                raise AssertionError(f"import of {name}")

        monkeypatch.setattr(sys, "meta_path", [Refuse()])

    def test_the_trap_springs_when_a_plug_in_is_asked_for(self) -> None:
        with pytest.raises(AssertionError, match="import of no_such_module"):
            policy_class("every_other")

    @pytest.mark.parametrize("kind", ["antigravity", "antigravity:geohash", "policies.fixed_stride.FixedStride", ""])
    def test_a_kind_that_is_no_plug_in_is_refused_without_an_import(self, kind: str, model: ModelShape) -> None:
        before = set(sys.modules)
        nested = {"kind": "max_age", "policy": {"kind": kind}, "max_age": 3}
        file = PolicyFile(AlwaysFull(), Selection(64), model).to_json()
        for refused in ({"kind": kind}, nested):
            with pytest.raises(ValueError, match=f"unknown policy kind {kind!r}: known are .*every_other"):
                policy_from_json(refused)
            with pytest.raises(ValueError, match=f"unknown policy kind {kind!r}: known are .*every_other"):
                PolicyFile.from_json(file | {"policy": refused})
        assert set(sys.modules) == before

    def test_built_in_kinds_load_no_plug_in(self, model: ModelShape) -> None:
        file = PolicyFile(MaxAge(AlwaysFull(), 3), Selection(64), model)
        assert PolicyFile.from_json(file.to_json()) == file
