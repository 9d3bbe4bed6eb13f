"""Methods along given texts, as `benchmarks/long_outputs.py` follows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import NeverFull, Selection
from recycler.evaluate import Method, Quest, Scheduled
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import LoadedModel
from recycler.tasks import TaskPrompt


@pytest.fixture
def method_loops(benchmark_module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return benchmark_module("method_loop").method_loops


def test_a_method_that_attends_to_everything_is_full_attention(
    method_loops: Any, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], tmp_path: Path
) -> None:
    prompts = [make_task(seed).prompt for seed in range(14)]
    whole = Quest("pages", "", 64, page_tokens=16)
    found = method_loops(tmp_path, loaded, prompts, whole)
    assert len(found) == 14
    for loop in found:
        np.testing.assert_allclose(loop.kl, 0, atol=1e-12)
        assert loop.agreement.all()
        assert (loop.full == 1).all()
        assert (loop.read_share == 1).all()


def test_a_schedule_is_what_its_closed_loop_is(
    method_loops: Any, loaded: LoadedModel, make_task: Callable[..., TaskPrompt], tmp_path: Path
) -> None:
    prompts, selection = [make_task(seed).prompt for seed in range(3)], Selection(12, sinks=2, window=4)
    never: Method = Scheduled("never", "", NeverFull(), selection)
    found = method_loops(tmp_path, loaded, prompts, never)
    expected = ClosedLoopStore(tmp_path).run_all(loaded, prompts, [NeverFull()], selection)
    for loop, of_policies in zip(found, expected, strict=True):
        for name in ("kl", "agreement", "accuracy", "full", "read_share"):
            np.testing.assert_allclose(getattr(loop, name), getattr(of_policies, name)[0], atol=1e-9)
        assert loop.kl.mean() > 1e-4
