"""The README's example of a policy works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from policies import Schedule

README = Path(__file__).parents[1] / "README.md"


def test_the_policy_of_the_readme_decides_within_its_budget() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (source,) = [block for block in blocks if "StepPolicy" in block]
    names: dict[str, object] = {"__name__": __name__}
    # As in a file of its own, without the __future__ import of this one.
    exec(compile(source, str(README), "exec", dont_inherit=True), names)
    policy = names["policy"]
    schedule = Schedule(np.zeros((2, 3)))
    n_steps = 200
    for _ in range(n_steps):
        schedule.advance(policy.decide(schedule.signals(query_similarity=np.full((2, 3), 0.2))))  # type: ignore[attr-defined]
    assert (schedule.n_full == n_steps * 0.1).all()


def test_every_path_that_the_readme_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert paths
    for path in paths:
        assert (README.parent / path.partition("#")[0]).exists(), path
