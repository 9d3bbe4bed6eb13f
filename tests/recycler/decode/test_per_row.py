"""A batch in which every row follows its own policy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RefreshKeys,
    Selection,
)
from recycler.decode.per_row import PerRow
from recycler.decode.session import recycled

SELECTION = Selection(8, sinks=2, window=3)
ROWS = (
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    MaxAge(NeverFull(), 4),
    LearnedLogistic(("age", "refresh_loss"), (0.5, 1.0), -1.5),
    CosineThreshold(0.5),
    RefreshKeys(CosineThreshold(0.9), ((1, 0), (0, 1))),
)


def test_rows_follow_their_own_policies(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], spy: Callable[..., Any]
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=len(ROWS))
    together = [spy(policy) for policy in ROWS]
    with recycled(model, PerRow(tuple(together)), SELECTION):
        found = model.generate(tokens, max_new_tokens=16)
    for row, policy in enumerate(ROWS):
        alone = spy(policy)
        with recycled(model, alone, SELECTION):
            assert torch.equal(model.generate(tokens[row : row + 1], max_new_tokens=16)[0], found[row])
        for layer, steps in alone.seen.items():
            for mine, ours in zip(steps, together[row].seen[layer], strict=True):
                assert ours["full"].tolist() == mine["full"].tolist()


def test_needs_are_those_of_all_rows() -> None:
    assert PerRow(ROWS).needs == {"refresh_mass", "query_similarity"}
    assert PerRow((AlwaysFull(),)).needs == frozenset()


def test_what_rows_say_of_keys_only_refreshes_is_said_for_all_only_if_they_agree() -> None:
    assert PerRow((AlwaysFull(), NeverFull())).keys_only == 0
    some = ((1, 0), (0, 1))
    assert PerRow((RefreshKeys(AlwaysFull(), some), RefreshKeys(NeverFull(), some))).keys_only == some
    with pytest.raises(ValueError, match=r"^the policies inside of per_row refresh their sets in different ways\.$"):
        _ = PerRow(ROWS).keys_only


def test_shapes_are_those_of_all_rows(make_model: Callable[..., PreTrainedModel]) -> None:
    assert PerRow(ROWS).unit_shapes() == {(2, 2)}
    message = "the policy is for 2 layers x 2 KV heads, but .* has 2 layers x 4 KV heads"
    with pytest.raises(ValueError, match=message), recycled(make_model(kv_heads=4), PerRow(ROWS), SELECTION):
        pass


@pytest.mark.parametrize("rows", [1, 6])
def test_other_number_of_rows_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], rows: int
) -> None:
    message = f"^5 policies cannot decide for a batch of {rows} rows"
    with recycled(make_model(), PerRow(ROWS), SELECTION), pytest.raises(ValueError, match=message):
        make_model().generate(make_tokens(20, rows=rows), max_new_tokens=4)
