"""`python tests/floors.py`: every dependency at the least version that pyproject.toml allows, as pip's constraints.

Given the XML that pytest wrote of a run on them, what came out stands at the end.

torch stays as it is pinned: other wheels without CUDA are not on PyPI. Its floor is what the GPU engine ran on.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
_EXTRAS = ("default-model", "dev")


def floors(pyproject: str, pinned: str) -> list[str]:
    """Lines of a constraints file.

    Args:
        pyproject: The project's TOML.
        pinned: The constraints that other environments are made with.

    Raises:
        ValueError: If a requirement has no least version.
    """
    project = tomllib.loads(pyproject)["project"]
    (torch,) = re.findall(r"^torch==.*$", pinned, flags=re.MULTILINE)
    lines = []
    extras = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *(one for extra in _EXTRAS for one in extras[extra])):
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} in pyproject.toml has no least version.")
        name, version = found.groups()
        lines.append(torch if name == "torch" else f"{name}=={version}")
    return lines


def outcome(xml: str) -> str:
    """What pytest says in the end: `10 passed, 2 skipped`."""
    suite = ElementTree.fromstring(xml).find("testsuite")
    assert suite is not None
    n = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = n["failures"] + n["errors"]
    failed = f", {bad} failed" if bad else ""
    return f"{n['tests'] - bad - n['skipped']} passed, {n['skipped']} skipped{failed}"


if __name__ == "__main__":
    print("\n".join(floors((ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text())))
    for run in sys.argv[1:]:
        print(outcome(Path(run).read_text(encoding="utf-8")))
