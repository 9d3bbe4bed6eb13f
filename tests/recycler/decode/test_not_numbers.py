"""A row whose numbers are none does not stop its batch, and somebody is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import FixedStride, NeverFull, RefreshKeys, Selection, StepPolicy
from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.decode.not_numbers import NotNumbers
from recycler.decode.recycled import recycled

Make = Callable[..., Any]
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MACHINE = Machine(3, tile_bytes=16 * 16 * 4, chunk_tokens=16, captures=HAS_GPU, compiles=HAS_GPU)
SELECTION = Selection(9, 1, 3)
POISON = 60


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    """A token of its vocabulary has an embedding of NaN; it is never generated."""
    model = copy.deepcopy(make_model())
    head = model.lm_head.weight.detach().clone()
    model.get_input_embeddings().weight.data[POISON] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(head)
    return model


def generate(model: PreTrainedModel, tokens: torch.Tensor, fast: bool, **how: Any) -> tuple[list[list[int]], Any]:
    with recycled(model, FixedStride(3), SELECTION, fast=fast, **how) as session:
        text = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=59, pad_token_id=0)  # type: ignore[operator]
        again = session.turns()[-1]
    return text[:, tokens.shape[1] :].tolist(), (session.receipt(), again)


@pytest.mark.parametrize("how", [{}, {"exact": True}], ids=["approximate", "exact"])
@pytest.mark.parametrize("fast", [True, False], ids=["cpu", "plain"])
def test_a_bad_row_is_told_of_and_the_others_are_as_alone(model: PreTrainedModel, fast: bool, how: Any) -> None:
    tokens = torch.randint(1, 59, (3, 30), generator=torch.Generator().manual_seed(1))
    tokens[1, 12] = POISON
    with pytest.warns(UserWarning, match="^row 1 has NaN in its prompt, and runs full from there") as warned:
        texts, (receipt, turn) = generate(model, tokens, fast, **how)
    assert len([one for one in warned if "NaN" in str(one.message)]) == 1
    # From its first step on; the others are full at one of the five.
    if not how:
        assert receipt.full_steps.tolist() == np.full(receipt.full_steps.shape, 5 + 2).tolist()
    assert [note for note in receipt.notes if "NaN" in note] == [note for note in turn.notes if "NaN" in note]
    assert sum("row 1 has NaN" in note for note in receipt.notes) == 1
    assert any("row 1 has NaN" in note for note in receipt.to_json()["notes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in (0, 2):
            assert generate(model, tokens[row : row + 1], fast, **how)[0][0] == texts[row]


@pytest.mark.parametrize("policy", [NeverFull(), RefreshKeys(FixedStride(4))], ids=lambda policy: policy.kind)
@pytest.mark.parametrize("path", ["cpu", "cpu_modules", "plain", "cuda"])
def test_a_bad_row_runs_full_and_that_row_alone(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, path: str, policy: StepPolicy
) -> None:
    how = {"head_dim": 16, "dtype": torch.float32} if path == "cuda" else {}
    model = copy.deepcopy(make_model(**how)).to(DEVICE if path == "cuda" else "cpu")
    if path == "cuda":
        monkeypatch.setattr(engines, "engine_for", lambda model: CudaEngine(model, MACHINE))
    if path == "cpu_modules":
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    tokens = torch.randint(1, 59, (2, 36), generator=torch.Generator().manual_seed(1), device="cpu").to(model.device)
    poisoned = 33
    model.get_input_embeddings().weight.data[POISON] = float("nan")
    tokens[0, poisoned] = POISON
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), recycled(model, policy, SELECTION, fast=path != "plain") as session:
            cache = model(tokens[:, :30], use_cache=True).past_key_values
            for place in range(30, 36):
                model(tokens[:, place : place + 1], past_key_values=cache)
                done.append(session.receipt())
    assert done[-1].engine == path
    # Of both rows together: how many of a step's unit-steps were full.
    units = done[0].full_steps.size
    full = np.diff([0, *(one.full_steps.sum() for one in done)]) / units
    usual = [0.0] * 6 if isinstance(policy, NeverFull) else [2.0 if step % 4 == 3 else 0.0 for step in range(6)]
    # The step of the bad token is as ever; those after it are full in its row.
    expected = [max(both, 1.0) if place > poisoned - 30 else both for place, both in enumerate(usual)]
    assert full.tolist() == expected
    assert any("row 0 has NaN" in note and "runs full" in note for note in done[-1].notes)


def test_the_first_bad_step_counts_and_each_row_is_warned_of_once() -> None:
    watch = NotNumbers()
    logits = torch.zeros(2, 5)
    watch.see(logits)
    assert watch.sentences() == ()
    logits[1, 3] = float("nan")
    with pytest.warns(UserWarning, match="row 1 has NaN among its logits from step 2 on"):
        watch.see(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.see(logits)
    assert watch.sentences() == (
        "row 1 has NaN among its logits from step 2 on, and runs full from there: what it wrote means nothing.",
    )


def test_infinities_are_numbers() -> None:
    watch = NotNumbers()
    watch.see(torch.tensor([[float("-inf"), 1.0]]))
    assert watch.sentences() == ()
