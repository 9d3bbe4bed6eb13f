"""Prompts whose output turns: what they ask for is in the context, and they say where they turn."""

import itertools
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recycler.model.default_model import default_model_folder
from recycler.prompts import KINDS, TURNING_KINDS, Prompt, default_prompts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(default_model_folder())


def one_prompt(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, context_tokens: int = 1024, index: int = 0, seed: int = 0
) -> Prompt:
    (prompt,) = default_prompts(
        tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=256, kinds=[kind], first_index=index, seed=seed
    )
    return prompt


def context_and_segments(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, list[str]]:
    """The prompt, and the whole segments of its continuation."""
    n = prompt.n_prompt_tokens
    spans = itertools.pairwise(prompt.events)
    return tokenizer.decode(prompt.tokens[:n]), [tokenizer.decode(prompt.tokens[n + a : n + b]) for a, b in spans]


def test_default_prompts_turn_only_if_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    usual = default_prompts(tokenizer, n_per_kind=1, context_tokens=256, n_steps=16)
    assert [prompt.kind for prompt in usual] == list(KINDS)
    assert not any(prompt.events for prompt in usual)
    assert not set(KINDS) & set(TURNING_KINDS)


@pytest.mark.parametrize("kind", TURNING_KINDS)
def test_prompts_that_turn_have_their_sizes_and_say_where_they_turn(
    tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    prompt = one_prompt(tokenizer, kind)
    assert (prompt.n_prompt_tokens, prompt.n_steps) == (1024, 256)
    assert 3 <= len(prompt.events) <= 40
    # By no clock.
    assert len({later - event for event, later in itertools.pairwise(prompt.events)}) > 1
    again, other, drawn = (one_prompt(tokenizer, kind, **how) for how in ({}, {"index": 1}, {"seed": 1}))
    assert again.tokens.tolist() == prompt.tokens.tolist()
    assert again.events == prompt.events
    assert other.events != prompt.events
    assert drawn.tokens.tolist() != prompt.tokens.tolist()


@pytest.mark.parametrize("kind", TURNING_KINDS)
def test_the_shortest_context_is_enough(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    (prompt,) = default_prompts(tokenizer, n_per_kind=1, context_tokens=128, n_steps=64, kinds=[kind])
    assert (prompt.n_prompt_tokens, prompt.n_steps) == (128, 64)


def test_a_context_without_room_for_notes_is_refused(byte_model: Path) -> None:
    with pytest.raises(ValueError, match="128 tokens of context are too few to hide 2 notes in"):
        one_prompt(AutoTokenizer.from_pretrained(byte_model), "several_questions", context_tokens=128)


def test_questions_are_answered_by_what_is_hidden_once(tokenizer: PreTrainedTokenizerBase) -> None:
    context, segments = context_and_segments(tokenizer, one_prompt(tokenizer, "several_questions"))
    notes = dict(re.findall(r" Note on (\w+): (.*?) End of note\.", context, re.DOTALL))
    assert len(notes) == 6
    asked = [
        re.fullmatch(r"What does the note on (\w+) say\? It says: (.*)\n", segment, re.DOTALL) for segment in segments
    ]
    assert all(one is not None and notes[one[1]] == one[2] for one in asked)


def test_a_jumping_copy_goes_on_where_the_passage_does(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = one_prompt(tokenizer, "jumping_copy")
    context = prompt.tokens[:1024].tolist()
    for begin, end in itertools.pairwise(prompt.events):
        piece = prompt.tokens[1024 + begin : 1024 + end].tolist()
        assert any(context[at : at + len(piece)] == piece for at in range(len(context)))


def test_lists_in_prose_are_lines_that_were_listed_and_an_essay_that_goes_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = one_prompt(tokenizer, "lists_in_prose")
    context, segments = context_and_segments(tokenizer, prompt)
    listed = set(re.findall(r"(?m)^[a-z]+: \d{4}$", context))
    lists = [segment for segment in segments if re.fullmatch(r"\n\n([a-z]+: \d{4}\n)+\n", segment)]
    assert {line for segment in lists for line in segment.split()[::2]} <= {line.split()[0] for line in listed}
    assert all(line in listed for segment in lists for line in segment.strip().splitlines())
    assert len(segments) // 2 <= len(lists) < len(segments)
    assert not any(re.search(r"\d{4}\n", segment) for segment in segments if segment not in lists)


def test_a_table_is_rewritten_row_by_row(tokenizer: PreTrainedTokenizerBase) -> None:
    context, segments = context_and_segments(tokenizer, one_prompt(tokenizer, "table_rewriting"))
    rows = ["\t".join(re.findall(r"<td>(.*?)</td>", row)) for row in re.findall(r"<tr>.*?</tr>", context)]
    assert len(rows) == len(set(rows)) > 20
    written = [segment.removesuffix("\n") for segment in segments]
    first = rows.index(written[0])
    assert written[: len(rows) - first] == rows[first : first + len(written)]


@pytest.mark.parametrize("events", [(-1,), (3,), (1, 1), (2, 1)])
def test_events_rise_within_the_continuation(events: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"events of prompt a-0 must rise within its 3 steps, not be"):
        Prompt("a-0", "a", list(range(8)), 5, "", "", events)
    assert Prompt("a-0", "a", list(range(8)), 5, "", "", (0, 2)).events == (0, 2)
