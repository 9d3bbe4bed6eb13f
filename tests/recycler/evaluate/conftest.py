"""A tiny model with a tokenizer that writes numbers, and questions about random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import FixedStride, NeverFull, Selection
from recycler.evaluate import Method, Quest, Scheduled
from recycler.evaluate.baselines import fresh_top_k
from recycler.evaluate.kascade import Kascade
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.tasks import TaskPrompt

N_PROMPT, N_REFERENCE, N_NEW = 40, 10, 14


class Numbers:
    """A tokenizer whose text of a token is its id."""

    def decode(self, tokens: Iterable[int]) -> str:
        return " ".join(str(token) for token in tokens)


@pytest.fixture
def load(make_model: Callable[..., PreTrainedModel]) -> Callable[..., LoadedModel]:
    def load(name: str = "tiny", dtype: torch.dtype = torch.float64) -> LoadedModel:
        return LoadedModel(make_model(dtype=dtype), Numbers(), name)  # type: ignore[arg-type]

    return load


@pytest.fixture
def loaded(load: Callable[..., LoadedModel]) -> LoadedModel:
    return load()


def _make_task(
    seed: int = 0,
    *,
    name: str = "numbers-000",
    n_prompt: int = N_PROMPT,
    n_reference: int = N_REFERENCE,
    n_new: int = N_NEW,
    score: Callable[[str], float] = lambda text: len(text) % 7 / 7,
) -> TaskPrompt:
    tokens = np.random.default_rng(seed).integers(1, 61, n_prompt + n_reference)
    return TaskPrompt(Prompt(name, "numbers", tokens, n_prompt, "drawn", "CC0-1.0"), n_new, score)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., TaskPrompt]:
    """Makes a prompt of random tokens with a reference of random tokens."""
    return _make_task


@pytest.fixture(scope="session")
def methods() -> list[Method]:
    """One of each kind, two that share a selection, and one that is full attention by another name."""
    window = Selection(12, sinks=2, window=4)
    return [
        Scheduled("stride", "", FixedStride(3), window),
        Quest("pages", "", 8, page_tokens=4, dense_layers=1),
        Kascade("anchors", "", 8, (0,), ((0, 1), (1, 0))),
        Scheduled("h2o", "", NeverFull(), Selection(12, 0, 6, 0, 0, "mean", "accumulated", None)),  # type: ignore[arg-type]
        Scheduled("never", "", NeverFull(), window),
        fresh_top_k("fresh", "", window),
        Scheduled("whole", "", FixedStride(1), window),
    ]
