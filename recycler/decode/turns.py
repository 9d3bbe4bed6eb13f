"""What a session did: a receipt for each output, and one for all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from typing import Protocol

import numpy as np
from torch import Tensor

from recycler.decode.governor import GovernedWindow
from recycler.decode.not_numbers import NotNumbers
from recycler.decode.receipt import Receipt
from recycler.decode.tally import Tally

# Turns whose receipts are kept: a session may live as long as a server.
_MOST_TURNS = 100


class Run(Protocol):
    """Decode steps that something takes one after the other."""

    def add_to(self, tally: Tally) -> None:
        """Tell what was done so far."""


class Turns:
    """Outputs of a session: what was decoded after one prompt, or one more turn of it, is one.

    A turn may be of several runs, as an audit begins another.

    Args:
        units: `(layers, kv_heads)`.
        horizon_steps: Of receipts.
        notes: Of receipts.

    Attributes:
        why_plain: Why steps are taken on the plain path, if they are.
    """

    def __init__(self, units: tuple[int, int], horizon_steps: int | None, notes: tuple[str, ...]) -> None:
        self._units, self._horizon_steps, self._notes = units, horizon_steps, notes
        self._all, self._turn = Tally(units), Tally(units)
        self._ended: deque[Receipt] = deque(maxlen=_MOST_TURNS)
        self._not_numbers, self._said = NotNumbers(), dict[str, None]()
        self.why_plain = ""

    def add(self, run: Run) -> None:
        """Add a run that has ended to the turn."""
        run.add_to(self._turn)

    def see(self, logits: Tensor) -> Tensor | None:
        """Watch the logits of a step, `(rows, vocabulary)`, for what is no number; as `NotNumbers.see`."""
        return self._not_numbers.see(logits)

    def see_prompt(self, bad: Tensor) -> Tensor | None:
        """Take rows of what was read, which are no numbers, bool `(rows,)`; as `NotNumbers.see_prompt`."""
        return self._not_numbers.see_prompt(bad)

    def add_audit(self, kl: np.ndarray, tokens_read: int, window: GovernedWindow | None) -> None:
        """Add an audit to the turn, as `Tally.add_audit`."""
        self._turn.add_audit(kl, tokens_read, () if window is None else (window,))

    def end(self) -> bool:
        """End the turn, if there were steps in it; whether there were."""
        if not self._turn.n_steps:
            return False
        self._not_numbers.tell()
        receipt, self._turn = self._receipt_of_turn(self._turn), Tally(self._units)
        self._said |= dict.fromkeys(self._not_numbers.sentences())
        self._not_numbers = NotNumbers()
        self._all.add(receipt)
        self._ended.append(receipt)
        return True

    def receipt(self, run: Run | None) -> Receipt:
        """Of all turns, the one under way and its run among them."""
        tally = copy.deepcopy(self._all)
        tally.add(self._current(run))
        return self._receipt_of(tally, tuple(self._said | dict.fromkeys(self._not_numbers.sentences())))

    def each(self, run: Run | None) -> tuple[Receipt, ...]:
        """A receipt for each turn, the one under way among them: the last 100 of them."""
        current = self._current(run)
        unfinished = [current] if current.n_steps else []
        return (*self._ended, *unfinished)[-_MOST_TURNS:]

    @property
    def beyond_horizon(self) -> str:
        """As of a receipt of the last turn that has ended."""
        return self._ended[-1].beyond_horizon if self._ended else ""

    def _current(self, run: Run | None) -> Receipt:
        turn = copy.deepcopy(self._turn)
        if run is not None:
            run.add_to(turn)
        return self._receipt_of_turn(turn)

    def _receipt_of_turn(self, turn: Tally) -> Receipt:
        # Its runs are parts of one output.
        receipt = self._receipt_of(turn, self._not_numbers.sentences())
        return dataclasses.replace(receipt, longest_steps=turn.n_steps)

    def _receipt_of(self, tally: Tally, more_notes: tuple[str, ...]) -> Receipt:
        return tally.receipt(self.why_plain, self._horizon_steps, (*self._notes, *more_notes))
