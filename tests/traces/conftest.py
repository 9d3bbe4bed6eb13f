from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from traces import Trace, TraceHeader
from traces.reporting.command import run_command


def _make_trace(
    name: str = "one",
    kind: str = "prose",
    *,
    n_steps: int = 6,
    max_age: int = 4,
    units: tuple[int, int] = (2, 3),
    n_prompt_tokens: int = 5,
    k: int = 64,
    seed: int = 0,
) -> Trace:
    rng = np.random.default_rng(seed)
    layers, kv_heads = units
    header = TraceHeader(
        model={
            "id": "tiny",
            "layers": layers,
            "kv_heads": kv_heads,
            "query_heads": 2 * kv_heads,
            "head_dim": 8,
            "dtype": "float32",
        },
        selection={"k": k, "sinks": 4, "window": 32},
        prompt={
            "name": name,
            "kind": kind,
            "source": "none",
            "licence": "CC0-1.0",
            "n_prompt_tokens": n_prompt_tokens,
        },
        n_steps=n_steps,
        ages=range(1, max_age + 1),
        versions={"numpy": np.__version__},
    )
    recorded = np.arange(1, max_age + 1)[None, :] <= np.arange(n_steps)[:, None] + 1

    def by_age(low: float) -> np.ndarray:
        values = rng.uniform(low, 1, (n_steps, max_age, layers, kv_heads))
        return np.where(recorded[:, :, None, None], values, np.nan).astype(np.float32)

    token_log_prob = -rng.exponential(2, n_steps)
    token_log_prob[-1:] = np.nan
    return Trace(
        header=header,
        tokens=rng.integers(0, 1000, n_prompt_tokens + n_steps, dtype=np.int32),
        recovered_mass=by_age(0),
        query_similarity=by_age(-1),
        overlap=by_age(0),
        fresh_mass=rng.uniform(0, 1, (n_steps + 1, layers, kv_heads)).astype(np.float32),
        token_log_prob=token_log_prob.astype(np.float32),
    )


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., Trace]:
    """Makes a random trace with NaN where no set of that age exists."""
    return _make_trace


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command function with arguments: exit code, standard output, standard error."""

    def run(command: Callable[..., Any], *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(command, list(arguments))
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run
