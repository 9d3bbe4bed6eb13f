"""Two ways to attend: sets gathered out of the cache, and masks over the whole product."""

import pytest
import torch
from torch import Tensor

from policies import Selection
from recycler.decode.plain.attention import GatheredSets, MaskedSets
from recycler.sets.recycled_set import RecycledSet
from recycler.sets.scores import Scoring, probabilities

ROWS, KV_HEADS, GROUP, TOKENS, HEAD_DIM = 4, 3, 2, 11, 5
SHARES = [0.0, 0.4, 1.0]


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) - 0.5


@pytest.fixture
def sets() -> RecycledSet:
    """Some of every size from 1 to 6, of tokens from place 3 on."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.full((ROWS, KV_HEADS, 6), -1)
    for index, unit in enumerate(positions.view(-1, 6)):
        size = 1 + index % 6
        unit[torch.randperm(6, generator=generator)[:size]] = 3 + torch.randperm(8, generator=generator)[:size]
    return RecycledSet(positions, torch.zeros(positions.shape), Selection(6, 0, 0))


def decisions(share: float) -> Tensor:
    return torch.rand(ROWS, KV_HEADS, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("padded", [False, True])
def test_full_units_see_everything_visible_and_recycled_ones_their_set(
    sets: RecycledSet, share: float, padded: bool
) -> None:
    query, key = random(ROWS, KV_HEADS, GROUP, HEAD_DIM), random(ROWS, KV_HEADS, TOKENS, HEAD_DIM)
    value, full = random(ROWS, KV_HEADS, TOKENS, HEAD_DIM + 0) * 2, decisions(share)
    visible = torch.arange(TOKENS) >= torch.arange(ROWS)[:, None] if padded else None
    found = GatheredSets(query, key, value, visible, Scoring(0.7)).attend(full, sets)
    n_full = n_recycled = 0
    for row in range(ROWS):
        for head in range(KV_HEADS):
            slots = sets.positions[row, head]
            seen = slots[slots >= 0] if not full[row, head] else torch.arange(row if padded else 0, TOKENS)
            weights = (query[row, head] @ key[row, head, seen].T * 0.7).softmax(-1)
            torch.testing.assert_close(found.output[row, head], weights @ value[row, head, seen])
            if full[row, head]:
                torch.testing.assert_close(found.full_probabilities[n_full][:, seen], weights)
                assert (int(found.full[0][n_full]), int(found.full[1][n_full])) == (row, head)
                n_full += 1
            else:
                torch.testing.assert_close(found.set_probabilities[n_recycled][:, slots >= 0], weights)
                assert (found.set_probabilities[n_recycled][:, slots < 0] == 0).all()
                n_recycled += 1
    assert len(found.full_probabilities) == n_full
    assert len(found.set_probabilities) == n_recycled


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shared", [0, 1, 7, 10])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_agree_with_gathered_sets_also_where_rows_share_a_part(
    sets: RecycledSet, share: float, shared: int, padded: bool
) -> None:
    query = random(ROWS, KV_HEADS, GROUP, HEAD_DIM)
    keys, values = (
        (random(1, KV_HEADS, shared, HEAD_DIM) + shift, random(ROWS, KV_HEADS, TOKENS - shared, HEAD_DIM) + shift)
        for shift in (0, 0.25)
    )
    key, value = (torch.cat([common.expand(ROWS, -1, -1, -1), own], dim=2) for common, own in (keys, values))
    visible = torch.arange(TOKENS) >= torch.arange(ROWS)[:, None] if padded else None
    gathered, masked = (
        GatheredSets(query, key, value, visible, Scoring(0.7)),
        MaskedSets(query, keys, values, visible, Scoring(0.7)),
    )
    expected, found = (one.attend(decisions(share), sets) for one in (gathered, masked))
    for name in vars(expected):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    some = decisions(0.5).nonzero(as_tuple=True)
    torch.testing.assert_close(masked.score(some), gathered.score(some))


def test_probabilities_have_at_least_float32() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert probabilities(torch.zeros(3, dtype=dtype), None).dtype == expected
    allowed = torch.tensor([True, False, True])
    assert probabilities(torch.zeros(3), allowed).tolist() == [0.5, 0, 0.5]
