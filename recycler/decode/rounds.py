"""Decoding whose logits are full attention's: drafts run ahead on recycled attention, full forwards verify them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from policies import StepPolicy
from policies.stops import DraftSignals, Outlook, StopRule
from recycler.decode.cache import KvLayer
from recycler.decode.counts import Totals
from recycler.decode.engine import Decoding, Drafting, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.round_counts import RoundCounts
from recycler.model.decoder_parts import NotCovered

# A row that is so many verified tokens ahead of the text takes no part in a round.
_FAR_AHEAD_TOKENS = 32


@dataclass
class _Row:
    """A row of the text.

    Attributes:
        verified: Tokens that are verified and were not fed yet, in order, each with the logits after it, their best,
            and whether it was drafted.
        last: The token that was fed last.
        place: The position at which the next one is expected.
        best: The most likely token after it.
        repeats: Whether the text is over, and is fed one token again and again.
        n_tokens: Tokens of the text.
        n_accepted: Those of them that were drafted.
    """

    verified: deque[tuple[int, Tensor, int, bool]] = field(default_factory=deque)
    last: int = -1
    place: int = -1
    best: int = -1
    repeats: bool = False
    n_tokens: int = 0
    n_accepted: int = 0

    def answer(self) -> Tensor:
        """The logits after the token that is fed now."""
        _, logits, self.best, drafted = self.verified.popleft()
        # Of a text that is over nothing was drafted that anybody looks at.
        if not self.repeats:
            self.n_tokens += 1
            self.n_accepted += drafted
        return logits


class ExactEngine(Engine):
    """Decodes in rounds on another engine.

    Args:
        engine: What drafts and verifies.
        stop: When a round ends.
        most_tokens: Tokens that the model has room for, text and drafts together.
    """

    def __init__(self, engine: Engine, stop: StopRule, most_tokens: int) -> None:
        self.name, self.holds_weights, self.why_modules = engine.name, engine.holds_weights, engine.why_modules
        self.counts_tokens = engine.counts_tokens
        self._engine, self._stop, self._most_tokens = engine, stop, most_tokens

    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> Rounds:
        if passing is not None:
            raise NotCovered("layers with a window or a recurrence do not take back what was drafted")
        drafting = self._engine.begin_drafts(layers, first, policy)
        return Rounds(drafting, self._stop, layers, first, self._most_tokens)

    def compile(self, *, drafts: bool = False) -> None:
        self._engine.compile(drafts=True)


class Rounds(Decoding):
    """See `Decoding`; what a step returns is what full attention returns.

    A token that is fed is either one that was drafted, so that its logits are known already, or it begins a round:
    drafts go on from it, each the most likely token, until the rule stops them; one forward verifies them all, writes
    exact keys and values over theirs, and chooses sets anew. Rows run ahead of the text, each as far as its own drafts
    hold, so that a row which is wrong costs the others nothing.

    Args:
        drafting: Runs drafts and verifications.
        stop: When a round ends.
        layers: The cache; it shows what was fed, and never what was drafted.
        first: What the prompt left behind.
        most_tokens: Tokens that the model has room for.
    """

    def __init__(
        self, drafting: Drafting, stop: StopRule, layers: Sequence[KvLayer], first: FirstSets, most_tokens: int
    ) -> None:
        self._drafting, self._stop, self._layers = drafting, stop, layers
        self._rows = [_Row() for _ in range(first.n_rows)]
        part = layers[0].parts[0]
        self._n_prompt, self._most_tokens = part.prompt.shape[2], float(most_tokens)
        if first.end > most_tokens:
            # Whoever is beyond them already goes on as stock decoding does.
            self._most_tokens = float("inf")
        self._n_own = np.full(first.n_rows, part.n_own)
        self._start, self._units, self._dtype = first.start, first.units, layers[0].dtype
        self._verified_reads = np.zeros(first.n_rows)
        self._n_verified = np.zeros(first.n_rows, dtype=np.int64)
        self._rounds = RoundCounts()

    @property
    def rounds(self) -> RoundCounts:
        followed = (sum(row.n_accepted for row in self._rows), sum(row.n_tokens for row in self._rows))
        return self._rounds + RoundCounts(0, 0, *followed)

    @property
    def full(self) -> np.ndarray:
        return np.ones((len(self._rows), *self._units), dtype=bool)

    @property
    def keys_only(self) -> np.ndarray:
        return np.zeros((len(self._rows), *self._units), dtype=bool)

    @property
    def tokens_read(self) -> np.ndarray:
        """What was read for a step is read for several at once: NaN."""
        return np.full((len(self._rows), *self._units), np.nan)

    def totals(self) -> Totals:
        """What drafts did, and every verification of a row as a full step."""
        drafts = self._drafting.totals()
        return Totals(
            full_steps=drafts.full_steps + self._n_verified[:, None, None],
            keys_only_steps=drafts.keys_only_steps,
            tokens_read=drafts.tokens_read + self._verified_reads[:, None, None],
            reasons=drafts.reasons,
        )

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        due = np.zeros(len(self._rows), dtype=bool)
        places = places.expand(len(tokens))
        # One look at a device.
        fed = torch.stack((tokens, places), dim=1).tolist()
        for i, (row, (token, place)) in enumerate(zip(self._rows, fed, strict=True)):
            if not row.verified or row.verified[0][0] != token or row.place != place:
                due[i] = True
                # A text that has ended is fed the padding token from there on, whatever its logits say.
                row.repeats = token == row.last != row.best
                row.verified.clear()
            row.last, row.place = token, place + 1
        if due.any():
            self._round(tokens, places, due)
        answer = torch.stack([row.answer() for row in self._rows])
        self._n_own += 1
        for layer in self._layers:
            for part in layer.parts:
                part.n_own += 1
        return answer

    def _round(self, fed: Tensor, fed_places: Tensor, due: np.ndarray) -> None:
        """Draft and verify, until every row that is due has an answer."""
        ahead = np.array([len(row.verified) for row in self._rows])
        going = due | ((ahead < _FAR_AHEAD_TOKENS) & (self._room(ahead) > 0))
        begin = self._n_own + ahead
        tokens, device = fed.clone(), fed.device
        for i in np.flatnonzero(going & ~due):
            row = self._rows[i]
            tokens[i] = row.last if row.repeats else row.verified[-1][2]
        places = fed_places + _sent(np.where(going, ahead, 0), device)
        self._drafting.begin_round(begin, going)
        drafted, n = self._draft(tokens, places, going, self._room(ahead))
        rows = np.repeat(np.arange(len(n)), n)
        offsets, of_rows = (_sent(one, device) for one in (np.arange(len(rows)) - (np.cumsum(n) - n)[rows], rows))
        flat = drafted[of_rows, offsets]
        # As the caller sees them: of two that are equal in its type it takes the first.
        logits = self._drafting.verify(flat, places[of_rows] + offsets, rows).to(self._dtype)
        self._accept(drafted.tolist(), n, logits)
        self._n_verified += going
        self._verified_reads += (self._n_prompt - self._start + begin + n) * going

    def _room(self, ahead: np.ndarray) -> np.ndarray:
        """Tokens that may come after those that a row is ahead by."""
        room: np.ndarray = self._most_tokens - self._n_prompt - self._n_own - ahead
        return room

    def _draft(self, tokens: Tensor, places: Tensor, going: np.ndarray, room: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The token that each row's round begins with and those that were drafted after it, and how many these are.

        Returns:
            int64 `(rows, tokens)`, where the longest row decides on their number, and int64 `(rows,)`.
        """
        drafted, n = [tokens], going.astype(np.int64)
        repeats = _sent(np.array([row.repeats for row in self._rows]), tokens.device)
        outlook = Outlook.before_drafts(len(going))
        # The first token of a round needs room too.
        going = going & (room > 1)
        for n_drafts in range(1, self._stop.most_drafts + 1):
            if not going.any():
                break
            logits = self._drafting.draft(tokens, places, going)
            tokens = torch.where(repeats, tokens, logits.argmax(-1))
            drafted.append(tokens)
            n += going
            if self._stop.reads_distributions:
                signals = draft_signals(logits, n_drafts)
            else:
                signals = DraftSignals(np.full(len(n), float(n_drafts)), *np.full((3, len(n)), np.nan))
            outlook = outlook.after(self._stop.acceptance(signals))
            going = going & ~self._stop.decide(signals, outlook) & (room > n_drafts + 1)
            # Those of rows that have stopped stay where the model has positions.
            places = places + _sent(going, places.device)
        return torch.stack(drafted, dim=1), n

    def _accept(self, drafted: list[list[int]], n: np.ndarray, logits: Tensor) -> None:
        """Keep what full attention would have chosen."""
        best, at = logits.argmax(-1).tolist(), 0
        for row, of_row, n_tokens in zip(self._rows, drafted, n, strict=True):
            tokens = of_row[:n_tokens]
            if not tokens:
                continue
            row.verified.append((tokens[0], logits[at], best[at], False))
            for j in range(1, len(tokens)):
                if not row.repeats and best[at + j - 1] != tokens[j]:
                    break
                row.verified.append((tokens[j], logits[at + j], best[at + j], True))
            if not row.repeats:
                self._rounds += RoundCounts(1, len(tokens) - 1)
            at += len(tokens)


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it is doing."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def draft_signals(logits: Tensor, n_drafts: int) -> DraftSignals:
    """What is known of the most likely token of each row, the latest of so many drafts."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    best, _ = log_p.topk(2, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    margin = best[:, 0] - best[:, 1]
    shown = torch.stack([best[:, 0].exp(), margin, entropy]).double().cpu().numpy()
    return DraftSignals(np.full(len(logits), float(n_drafts)), *shown)
