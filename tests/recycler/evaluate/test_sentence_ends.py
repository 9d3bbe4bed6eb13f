"""Which tokens of the default model's vocabulary end a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from policies import SentenceBoundary
from policies.sentence_boundary import MOST_TOKENS
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.model.default_model import default_model_folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(default_model_folder())


def one(tokenizer: Any, text: str) -> int:
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return int(token)


@pytest.mark.parametrize("text", [".", "!", "?", "\n", "\n\n", '."', ".)", '?"', "...", " .", "\n\t"])
def test_texts_that_end_a_sentence_are_found(tokenizer: Any, text: str) -> None:
    assert one(tokenizer, text) in sentence_end_tokens(tokenizer)


@pytest.mark.parametrize("text", ["a", ",", ";", ":", " the", '"', ")", " ", ".com", "?>", "\t"])
def test_other_texts_are_not(tokenizer: Any, text: str) -> None:
    assert not set(tokenizer.encode(text, add_special_tokens=False)[-1:]) & set(sentence_end_tokens(tokenizer))


def test_ends_of_sentences_are_found_in_a_text(tokenizer: Any) -> None:
    ids = tokenizer.encode('He said "no." Did he? Yes!\nThen, nothing')
    found = [tokenizer.decode([token]) for token in ids if token in sentence_end_tokens(tokenizer)]
    assert found == ['."', "?", "!", "\n"]


def test_of_more_than_may_be_the_shortest_are_taken(tokenizer: Any) -> None:
    ends = sentence_end_tokens(tokenizer)
    assert len(ends) == len(set(ends)) == MOST_TOKENS
    assert list(ends) == sorted(ends)
    assert sentence_end_tokens(tokenizer, most=4) == tuple(sorted(one(tokenizer, text) for text in ".!?\n"))
    assert set(sentence_end_tokens(tokenizer, most=30)) < set(ends)


def test_special_tokens_end_no_sentence_and_a_policy_takes_what_is_found(tokenizer: Any) -> None:
    ends = sentence_end_tokens(tokenizer)
    assert not set(ends) & set(tokenizer.all_special_ids)
    assert SentenceBoundary(ends).tokens == ends


def test_a_vocabulary_without_ends_is_refused() -> None:
    class Letters:
        all_special_ids: tuple[int, ...] = ()

        def __len__(self) -> int:
            return 26

        def batch_decode(self, ids: list[list[int]], **options: Any) -> list[str]:
            return [chr(97 + token) for (token,) in ids]

    with pytest.raises(ValueError, match=r"no token of this vocabulary ends a sentence\."):
        sentence_end_tokens(Letters())  # type: ignore[arg-type]
