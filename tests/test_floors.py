"""The constraints of `make test-floors` are the floors of pyproject.toml."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("floors", ROOT / "tests" / "floors.py")
assert spec is not None
assert spec.loader is not None
floors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(floors)


def test_every_requirement_is_held_to_its_floor() -> None:
    lines = floors.floors((ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text())
    assert len(lines) == len(set(lines)) > 20
    assert all("==" in line for line in lines)


def test_what_came_out_is_told() -> None:
    suite = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"></testsuite></testsuites>'
    assert floors.outcome(suite) == "5 passed, 2 skipped, 2 failed"


def test_a_requirement_without_a_floor_is_a_sentence() -> None:
    pyproject = '[project]\ndependencies = ["numpy"]\n[project.optional-dependencies]\n'
    with pytest.raises(ValueError, match=r"'numpy' in pyproject\.toml has no least version"):
        floors.floors(pyproject + "default-model = []\ndev = []\n", "torch==2.13.0+cpu\n")
