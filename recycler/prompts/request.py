"""One prompt that is asked of a generator."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from recycler.prompts.prompt import Prompt
from recycler.prompts.texts import TextSource, TokenisedCorpus, leading_tokens, text_tokens


@dataclass(frozen=True)
class PromptRequest:
    """One prompt that is asked of a generator.

    Attributes:
        kind: the kind asked for.
        index: which of the prompts of that kind, from 0 on.
        context_tokens: tokens of the prompt.
        n_steps: tokens of the continuation.
        seed: of everything that is drawn.
        tokenizer: the model's tokenizer.
        texts: opens a source of natural text; each is opened once.
    """

    kind: str
    index: int
    context_tokens: int
    n_steps: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    texts: Callable[[TextSource], TokenisedCorpus]

    @property
    def n_context(self) -> int:
        """Tokens of the prompt that are free to choose: all but a BOS."""
        return self.context_tokens - len(leading_tokens(self.tokenizer))

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` alone."""
        return text_tokens(self.tokenizer, text)

    def rng(self) -> random.Random:
        """A generator of its own for this kind, index and seed; a text seeds alike on every platform."""
        return random.Random(f"{self.seed} {self.kind} {self.index}")

    def prompt(
        self, tokens: Sequence[int] | npt.NDArray[np.int32], *, source: str, licence: str, events: Sequence[int] = ()
    ) -> Prompt:
        """The prompt that reads `tokens`, ``n_context + n_steps`` of them."""
        return Prompt(
            name=f"{self.kind}-{self.index:03d}",
            kind=self.kind,
            tokens=np.array([*leading_tokens(self.tokenizer), *tokens]),
            n_prompt_tokens=self.context_tokens,
            source=source,
            licence=licence,
            events=tuple(events),
        )
