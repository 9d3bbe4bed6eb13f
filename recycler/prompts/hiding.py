"""Hiding things in a long text, each after a sentence."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

# With more keys in one text the default model finds fewer than half of them.
MOST_NEEDLES = 8
TOKENS_PER_NEEDLE = 128


def needle(key: str, number: str | int) -> str:
    """What is hidden, in RULER's words (arXiv 2404.06654)."""
    return f" One of the special magic numbers for {key} is: {number}."


def spliced(
    hay: npt.NDArray[np.int32],
    hidden: Sequence[Sequence[int]],
    depths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """A text with things hidden in it.

    Args:
        hay: tokens of the text.
        hidden: tokens of each thing; each begins with a space.
        depths: places in the text, rising, each before the sentence end after which a thing is hidden.
        tokenizer: tells where sentences end.
    """
    pieces = np.split(hay, sentence_ends(hay, depths, tokenizer))
    between = (chain(thing, piece) for thing, piece in zip(hidden, pieces[1:], strict=True))
    return [*pieces[0], *chain.from_iterable(between)]


def sentence_ends(
    tokens: npt.NDArray[np.int32], depths: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """For each depth the end of the sentence there; the depth itself where no end follows."""
    closing = [token for token in np.unique(tokens).tolist() if _closes_sentence(str(tokenizer.decode([token])))]
    ends = np.flatnonzero(np.isin(tokens, closing)) + 1
    following = np.searchsorted(ends, depths)
    return [int(ends[i]) if i < len(ends) else depth for i, depth in zip(following, depths, strict=True)]


def _closes_sentence(piece: str) -> bool:
    return piece.rstrip("\"')\n").endswith((".", "?", "!"))
