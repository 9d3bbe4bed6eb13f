"""A batch in which every row follows its own policy."""

from collections.abc import Callable

import pytest
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
from recycler.decode.recycled import recycled

SELECTION = Selection(8, sinks=2, window=3)
ROWS = (
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    MaxAge(NeverFull(), 4),
    LearnedLogistic(("age", "refresh_loss"), (0.5, 1.0), -1.5),
    CosineThreshold(0.5),
    RefreshKeys(CosineThreshold(0.9), ((1, 0), (0, 1))),
)


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
