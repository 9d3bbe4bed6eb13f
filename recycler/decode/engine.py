"""What a decoder offers, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set

import numpy as np
from torch import Tensor
from transformers import DynamicCache

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import Totals
from recycler.decode.first_sets import FirstSets
from recycler.decode.round_counts import RoundCounts
from recycler.model.decoder_parts import NotCovered


class Decoding(ABC):
    """One run of decode steps after a prompt, on an engine.

    What it tells of the last step may be fetched from a device when it is asked for, and then takes time.
    """

    @property
    @abstractmethod
    def full(self) -> np.ndarray:
        """bool `(rows, layers, kv_heads)`: decisions of the last step."""

    @property
    @abstractmethod
    def keys_only(self) -> np.ndarray:
        """bool of the same shape: those of them that were keys-only refreshes."""

    @property
    @abstractmethod
    def tokens_read(self) -> np.ndarray:
        """float64 of the same shape: what each unit read of the cache at the last step, as `Totals` counts it."""

    @abstractmethod
    def totals(self) -> Totals:
        """What was done since the prompt."""

    @property
    def rounds(self) -> RoundCounts | None:
        """What its rounds came to; None if it does not decode in rounds."""
        return None

    def run_full(self, rows: Tensor) -> None:  # noqa: B027 - as its text says, some have nothing to do.
        """Let rows attend to everything from the next step on, whatever their policy says.

        What is full at every step anyway has nothing to do.

        Args:
            rows: bool `(rows,)`, on the model's device.
        """

    @abstractmethod
    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Decode one token per row.

        Args:
            tokens: int64 `(rows,)`.
            places: int64 `(rows,)` or `(1,)`: their positions, as rotary embedding counts them.

        Returns:
            Logits `(rows, vocabulary)`, a new tensor in the model's type or a wider one.
        """


class Drafting(ABC):
    """Decode steps ahead of a text, and what verifies them; rows may be at different places.

    A round of some rows is `begin_round`, any number of `draft`, one `verify`. What a draft writes to the cache lies
    beyond what the cache shows, and is written over by the verification.
    """

    @abstractmethod
    def begin_round(self, n_own: np.ndarray, going: np.ndarray) -> None:
        """Choose sets of rows by their last verification, or the prompt, and begin their schedule.

        Args:
            n_own: int64 `(rows,)`: tokens since the prompt that hold, of all rows: all of their last verification, or
                fewer.
            going: bool `(rows,)`: rows that take part in the round.
        """

    @abstractmethod
    def draft(self, tokens: Tensor, places: Tensor, going: np.ndarray) -> Tensor:
        """Take a step with some of the rows.

        Args:
            tokens: int64 `(rows,)`; any of the vocabulary for rows that take no part.
            places: int64 `(rows,)`: their positions, as rotary embedding counts them.
            going: bool `(rows,)`: rows of the round that take part.

        Returns:
            Logits `(rows, vocabulary)`; those of rows that take no part mean nothing.
        """

    @abstractmethod
    def verify(self, tokens: Tensor, places: Tensor, rows: np.ndarray) -> Tensor:
        """Read tokens with full attention, each row's after those that held when its round began.

        Args:
            tokens: int64 `(n,)`: those of a row side by side, in order.
            places: int64 `(n,)`: their positions.
            rows: int64 `(n,)`: their rows, rising.

        Returns:
            Logits `(n, vocabulary)`, a new tensor in the model's type or a wider one.
        """

    @abstractmethod
    def totals(self) -> Totals:
        """What drafts did since the prompt."""


def refuse_measured_sets(needs: Set[str]) -> None:
    """What fast engines say to drafts of a policy that reads measures of new sets.

    Args:
        needs: Signals that the policy reads.

    Raises:
        NotCovered: If a verification, which chooses the sets, does not measure what it reads of them.
    """
    if unmeasured := needs & {"refresh_mass", "refresh_overlap"}:
        raise NotCovered(f"it does not measure the sets that a verification chooses: {', '.join(sorted(unmeasured))}")


class Engine(ABC):
    """A decoder for one model.

    Building one raises `NotCovered` if it does not run the model.

    Attributes:
        name: In receipts.
        holds_weights: Whether it refers to the model's weights, and so follows no change of its modules.
        counts_tokens: Whether the position of a token is the number of those before it, where a call does not say.
        why_modules: Why the model's own modules run, as a clause; empty if they do not.
        most_voters: How many queries may choose sets after `repeat`; 0 if it does not offer that.
    """

    name: str
    holds_weights = True
    counts_tokens = True
    why_modules = ""
    most_voters = 0

    @abstractmethod
    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> Decoding:
        """Start decoding after a prompt.

        Args:
            layers: The cache of recycled layers, with the prompt in it; the engine appends to it.
            first: What the prompt left behind.
            policy: Who decides.
            passing: The cache of layers that pass through; None if all are recycled, as in models that engines run
                whose kernels do all of a step.

        Raises:
            NotCovered: If the engine does not run this.
        """

    def begin_drafts(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> Drafting:
        """Start to draft and verify after a prompt; arguments as of `begin`, but that nothing shows in the cache.

        Raises:
            NotCovered: If the engine does not run this.
        """
        raise NotCovered(f"the {self.name} engine does not verify drafts")

    def repeat(
        self, layers: Sequence[KvLayer], first: FirstSets, tokens: Tensor, places: Tensor
    ) -> tuple[Tensor, FirstSets]:
        """Read the last n tokens of a cache again, with full attention, and choose sets as after a prompt.

        Their keys and values become those of full attention. Of tokens before them none vote, however many the
        selection asks for.

        Args:
            layers: As of `begin`, with the tokens in them; like `first`.
            first: What decoding began from.
            tokens: int64 `(rows, n)`.
            places: int64 `(rows, n)`: their positions.

        Returns:
            Logits `(rows, n, vocabulary)`, a new tensor in the model's type or a wider one; and what is left to
            decoding, which knows no recovered mass.

        Raises:
            NotCovered: If it does not do that.
        """
        raise NotCovered(f"the {self.name} engine does not read several tokens at once")

    def compile(self, *, drafts: bool = False) -> None:  # noqa: B027 - as its text says, some have nothing to do.
        """Have compiled, or loaded from where it is kept, what steps run on, so that no step waits for it.

        An engine that compiles nothing has nothing to do.

        Args:
            drafts: Whether drafts are taken and verified.
        """
