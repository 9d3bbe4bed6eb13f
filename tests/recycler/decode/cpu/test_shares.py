"""Threads share work: each does its part, with all that it was given."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

from policies.compiled.kernel import helper
from recycler.decode.cpu.shares import on_threads


class Named(NamedTuple):
    array: np.ndarray
    factor: float


@helper()
def _note(thread: int, n_threads: int, turn: int, named: Any, out: Any) -> None:
    out[turn, thread, 0] += 1
    out[turn, thread, 1] = n_threads
    for i in range(named.array.shape[0]):
        out[turn, thread, 2] += named.factor * named.array[i]


@numba.njit
def _run(named: Any, out: Any, n_threads: int) -> None:
    for turn in range(out.shape[0] - 1):
        on_threads(_note, (turn, named, out), n_threads)
    on_threads(_note, (2, named, out), n_threads)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_every_share_is_done_once_and_sees_all_arguments(n_threads: int) -> None:
    # More shares than threads are done all the same.
    out = np.zeros((3, 6, 3))
    _run(Named(np.array([1.0, 2.0, 4.0]), 0.5), out, n_threads)
    np.testing.assert_array_equal(out[:, :n_threads], np.broadcast_to([1, n_threads, 3.5], (3, n_threads, 3)))
    assert not out[:, n_threads:].any()


def test_a_share_is_compiled_once_for_numbers_in_the_source_and_others() -> None:
    _run(Named(np.zeros(1), 0.5), np.zeros((3, 1, 3)), 1)
    assert len(_note.signatures) == 1
