"""Which tokens of a vocabulary end a sentence."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from policies.sentence_boundary import MOST_TOKENS

# A full stop, an exclamation or a question mark, also full-width ones, or a newline; then closing quotes (" ' and the
# curly and angular ones), brackets and space.
_ENDS_A_SENTENCE = re.compile(r"""[.!?\n\u3002\uff01\uff1f]["'\u201d\u2019\xbb)\]}\s]*\Z""")
_AT_ONCE = 4096


def sentence_end_tokens(tokenizer: PreTrainedTokenizerBase, most: int = MOST_TOKENS) -> tuple[int, ...]:
    """Ids of the tokens whose text ends a sentence, for `policies.SentenceBoundary`.

    A token does if its text ends in `.`, `!` or `?`, or holds a newline, followed by nothing but closing quotes,
    brackets and space. Abbreviations and decimal points count as well: a token is judged by its text alone.

    Args:
        tokenizer: Of the model.
        most: Ids to return at most; of more, those with the shortest texts are taken, and of equally short ones
            those with the smallest ids.

    Returns:
        The ids, sorted.

    Raises:
        ValueError: If no token ends a sentence.
    """
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    found: list[tuple[int, int]] = []
    for begin in range(0, len(ids), _AT_ONCE):
        part = ids[begin : begin + _AT_ONCE]
        texts = tokenizer.batch_decode([[token] for token in part], clean_up_tokenization_spaces=False)
        found += [(len(text), token) for text, token in zip(texts, part, strict=True) if _ENDS_A_SENTENCE.search(text)]
    if not found:
        raise ValueError("no token of this vocabulary ends a sentence.")
    return tuple(sorted(token for _, token in sorted(found)[:most]))
