"""A haystack has the length asked for and keeps the essays as they are around what is hidden."""

import random
from functools import cache
from itertools import chain

import pytest
from transformers import PreTrainedTokenizerBase

from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import TextSource, TokenisedCorpus
from recycler.tasks.haystack import haystack, repeated_essays


@pytest.fixture
def request_of_1000(tokenizer: PreTrainedTokenizerBase) -> PromptRequest:
    @cache
    def texts(source: TextSource) -> TokenisedCorpus:
        return TokenisedCorpus(source(), tokenizer)

    return PromptRequest("any", 1, 1000, 1, 0, tokenizer, texts)


@pytest.mark.parametrize("depths", [(0.0, 1.0), (0.0, 0.25), (0.5, 0.75)])
def test_hidden_things_keep_their_order_and_their_depths(
    request_of_1000: PromptRequest, depths: tuple[float, float]
) -> None:
    # No token of the vocabulary, so that they are found again.
    hidden = [[10**6, 10**6], [10**6 + 1], [10**6 + 2] * 3]
    tokens = haystack(request_of_1000, hidden, 900, random.Random(3), depths)
    assert len(tokens) == 900
    assert [token for token in tokens if token >= 10**6] == [*chain.from_iterable(hidden)]
    hay = [token for token in tokens if token < 10**6]
    assert hay == request_of_1000.texts(repeated_essays).passage(1, 1000)[:894].tolist()
    at = [i / 900 for i, token in enumerate(tokens) if token >= 10**6]
    # What is hidden moves on to the end of its sentence.
    assert depths[0] <= min(at)
    assert max(at) < depths[1] + 0.1
