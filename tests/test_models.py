"""What docs/models.md says of an architecture is what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recycler.model.memory import weight_bytes

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {name: line for line in PAGE.splitlines() if (name := "".join(re.findall(r"^\| ([A-Z].*?) \|", line)))}


@pytest.fixture(scope="module")
def models(benchmark_module: Callable[[str], Any]) -> Any:
    """The command that wrote the page."""
    return benchmark_module("models")


def test_the_page_has_all_families(models: Any) -> None:
    assert list(ROWS) == list(models.FAMILIES)
    assert PAGE.startswith(models.page({}).removesuffix("\n"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_a_family_does_what_the_page_says(models: Any, name: str) -> None:
    assert models.try_family(models.FAMILIES[name]).row(name) == ROWS[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "| refused |" not in row])
def test_what_a_family_reads_of_its_weights_is_known(models: Any, name: str) -> None:
    model = models.FAMILIES[name].model()
    read = weight_bytes(model)
    assert read is not None
    assert 0 < read <= sum(weight.nbytes for weight in model.parameters())


def test_few_families_are_refused_and_none_is_wrong() -> None:
    refused = [name for name, row in ROWS.items() if "| refused |" in row]
    assert refused == ["Falcon", "Falcon-H1", "Mamba"]
    assert all(row.endswith("| yes |") for name, row in ROWS.items() if name not in refused)
