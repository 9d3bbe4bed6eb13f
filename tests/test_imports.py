"""Which package may import which: read from the source, and tried in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("policies", "traces", "recycler", "tuning")
HEAVY = {"torch", "transformers"}

FORBIDDEN = {
    "policies": HEAVY | {"traces", "recycler", "tuning"},
    "traces": HEAVY | {"policies", "recycler", "tuning"},
    "recycler": {"tuning"},
    "tuning": {"recycler"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported, also inside functions and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def is_command(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parts[0]
    forbidden = FORBIDDEN[package]
    if package in ("recycler", "tuning") and is_command(tree):
        forbidden = set()  # A command may bring the two together.
    assert forbidden.isdisjoint(imports(tree))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_read(package: str) -> None:
    assert ROOT / package / "__init__.py" in MODULES


def test_imports_are_found_wherever_they_hide() -> None:
    source = (
        "import torch.nn as nn\nfrom . import tuning\nif True:\n    def f():\n        from recycler.a import b, c\n"
    )
    assert list(imports(ast.parse(source))) == ["torch", "recycler"]


@pytest.mark.parametrize("package", ["policies", "traces"])
def test_importing_a_package_that_needs_no_torch_does_not_import_it(package: str) -> None:
    script = f"import sys, {package}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["policies", "traces", "recycler"])
def test_a_decoder_needs_no_package_that_only_tuning_and_files_need(package: str) -> None:
    # What a machine with a GPU and its own torch may lack.
    missing = ("alembic", "gguf", "jinja2", "jsonschema", "optuna", "platformdirs", "scipy", "sklearn")
    script = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import {package}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
