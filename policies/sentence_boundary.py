"""Full attention where a sentence ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.shown import shown
from policies.signals import StepSignals

# Every id is a comparison at every step.
MOST_TOKENS = 256


@dataclass(frozen=True)
class SentenceBoundary(StepPolicy):
    """Run full when the token that is fed ends a sentence, and at the latest when the set is `max_age` steps old.

    Source: Slow-Fast Inference (SFI, arXiv 2603.12038): attention moves little within a sentence, so dense steps are
    taken near sentence boundaries, recognised by token ids, and when a refresh interval has passed since the last one
    (32 to 96 steps in the authors' scripts). Deviations: their code (github.com/LV-NUS/SFI) waits for the first token
    of the next sentence; here the full step is that of the token which ends the sentence, so that the set is fresh for
    the next one. They keep a least gap of 16 or 24 steps between two dense steps; here there is none unless `min_age`
    gives one. Their choice of sets is another too: see `Selection` for ours.

    A token that is not known (`signals.token` is NaN: the model is fed embeddings) leads to full attention.

    Attributes:
        tokens: Ids of the tokens that end a sentence, 1 to 256 of them, in any order, kept sorted;
            `recycler.evaluate.sentence_ends.sentence_end_tokens` finds those of a tokenizer.
        max_age: Steps, at least 1, as of the policy `MaxAge`. 1 means always full.
        min_age: Steps, at least 1: the end of a sentence does not count while the set is younger.
    """

    tokens: tuple[int, ...]
    max_age: PerUnit = 32
    min_age: PerUnit = 1
    kind: ClassVar[str] = "sentence_boundary"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _as_tokens(self.tokens))
        for name in ("max_age", "min_age"):
            object.__setattr__(self, name, as_per_unit(name, getattr(self, name), 1, float("inf")))

    def decide(self, signals: StepSignals) -> Array:
        token = signals.token
        full = (signals.age >= signals.per_unit(self.max_age)) | (token != token)
        ended = token == self.tokens[0]
        for end in self.tokens[1:]:
            ended = ended | (token == end)
        return full | (ended & (signals.age >= signals.per_unit(self.min_age)))


def _as_tokens(values: Any) -> tuple[int, ...]:
    try:
        tokens = list(values)
    except TypeError:
        raise ValueError(f"tokens must be several token ids, not {shown(values)}.") from None
    for token in tokens:
        # Integers of other libraries are as good; a bool, a float or a text is a mistake.
        if isinstance(token, (bool, float, str)) or not hasattr(token, "__index__") or not 0 <= int(token) < 2**31:
            raise ValueError(f"tokens must be token ids, whole numbers from 0 to 2**31 - 1, not {shown(token)}.")
    ids = tuple(sorted({int(token) for token in tokens}))
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise ValueError(
            f"tokens must name between 1 and {MOST_TOKENS} different tokens that end a sentence, not {len(ids)}."
        )
    return ids
