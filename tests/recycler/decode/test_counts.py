"""What unit-steps count and read, and whose full decisions are keys-only refreshes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from policies import AlwaysFull, NeverFull, RefreshKeys
from recycler.decode.counts import full_counts, keys_only_units, tokens_read
from recycler.decode.per_row import PerRow

SOME = ((1, 0), (0, 1))


class TestUnits:
    def test_one_policy_makes_one_row(self) -> None:
        assert keys_only_units(AlwaysFull(), (1, 2, 3)).tolist() == [[[False] * 3] * 2]
        assert keys_only_units(RefreshKeys(NeverFull()), (1, 2, 3)).tolist() == [[[True] * 3] * 2]
        assert keys_only_units(RefreshKeys(NeverFull(), SOME), (1, 2, 2)).tolist() == [[[True, False], [False, True]]]

    def test_policies_of_their_own_make_rows_of_their_own(self) -> None:
        rows = PerRow((AlwaysFull(), RefreshKeys(AlwaysFull(), SOME), RefreshKeys(AlwaysFull())))
        found = keys_only_units(rows, (3, 2, 2))
        assert found.tolist() == [[[False] * 2] * 2, [[True, False], [False, True]], [[True] * 2] * 2]


class TestCounts:
    FULL, KEYS = np.array([False, True, True]), np.array([False, False, True])

    def test_a_refresh_counts_half_a_full_step(self) -> None:
        assert full_counts(self.FULL, self.KEYS).tolist() == [0, 1, 0.5]

    @given(dense=st.integers(0, 10**6), in_set=st.integers(0, 10**4))
    def test_a_refresh_reads_all_keys_and_the_values_of_the_set(self, dense: int, in_set: int) -> None:
        read = tokens_read(self.FULL, self.KEYS, np.array(dense), np.array([in_set] * 3))
        assert read.tolist() == [in_set, dense, (dense + in_set) / 2]
