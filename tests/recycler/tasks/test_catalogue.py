"""What holds for the prompts of every task, and refusals."""

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recycler.model.default_model import default_model_folder
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import TokenisedCorpus
from recycler.tasks import TASKS, TaskPrompt, task_prompts

NATURAL = {"prose", "technical", "code"}
# Their questions end with a whole item of a list.
OF_ITEMS = {"common_words", "frequent_words", "key_values", "table_rewriting", "few_shot"}
DRAWN = set(TASKS) - NATURAL - {"copying"}

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Puts a BOS before every text, as the tokenizers of the Llama family do."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[bos]
    )
    return tokenizer


def same(a: TaskPrompt, b: TaskPrompt) -> bool:
    return (
        np.array_equal(a.prompt.tokens, b.prompt.tokens)
        and (a.prompt.name, a.prompt.n_prompt_tokens) == (b.prompt.name, b.prompt.n_prompt_tokens)
        and a.n_new_tokens == b.n_new_tokens
    )


def test_the_tasks_are_those_described_under_their_own_names() -> None:
    assert list(TASKS) == [
        "single_needle",
        "multi_key_needle",
        "multi_value_needle",
        "multi_query_needle",
        "variable_tracking",
        "common_words",
        "frequent_words",
        "copying",
        "key_values",
        "table_rewriting",
        "several_questions",
        "word_list",
        "few_shot",
        "prose",
        "technical",
        "code",
    ]
    assert all(name == task.name and "arXiv" in task.source for name, task in TASKS.items())
    with pytest.raises(TypeError):
        TASKS["prose"] = TASKS["code"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("context_tokens", [700, 1024, 5000])
def test_question_fills_the_context_asked_for(made: Made, name: str, context_tokens: int) -> None:
    prompt = made(name, context_tokens=context_tokens).prompt
    n_missing = context_tokens - prompt.n_prompt_tokens
    assert 0 <= n_missing <= (0.05 * context_tokens if name in OF_ITEMS else 0)
    assert (prompt.name, prompt.kind) == (f"{name}-000", name)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_reference_answer_scores_one(made: Made, texts: Texts, name: str, index: int) -> None:
    prompt = made(name, index)
    assert prompt.score(texts(prompt)[1]) == 1


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("answer", ["", "\n", "Pardon?"])
def test_an_empty_or_useless_answer_scores_zero(made: Made, name: str, answer: str) -> None:
    assert made(name).score(answer) == 0


@pytest.mark.parametrize("name", sorted(set(TASKS) - NATURAL - {"few_shot"}))
def test_the_answer_of_another_prompt_scores_next_to_nothing(made: Made, texts: Texts, name: str) -> None:
    assert made(name, 0).score(texts(made(name, 1))[1]) < 0.25


@pytest.mark.parametrize("name", sorted(set(TASKS) - NATURAL - {"few_shot", "single_needle", "multi_key_needle"}))
def test_a_part_of_the_answer_scores_a_part(made: Made, texts: Texts, name: str) -> None:
    prompt = made(name)
    answer = texts(prompt)[1]
    assert 0 < prompt.score(answer[: len(answer) // 2]) < 1


@pytest.mark.parametrize("name", sorted(set(TASKS) - NATURAL))
def test_reference_fits_into_the_tokens_of_an_own_answer(made: Made, name: str) -> None:
    prompt = made(name)
    assert prompt.prompt.n_steps <= prompt.n_new_tokens <= 64


@pytest.mark.parametrize("name", sorted(NATURAL))
def test_natural_text_is_only_teacher_forced(made: Made, name: str) -> None:
    prompt = made(name, n_steps=40)
    assert (prompt.n_new_tokens, prompt.prompt.n_steps) == (0, 40)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_reference_is_tokenised_as_it_is_met_after_the_question(
    made: Made, texts: Texts, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    prompt = made(name)
    question, answer = texts(prompt)
    last_line = question[question.rfind("\n", 0, -1) + 1 :]
    together = tokenizer.encode(last_line + answer, add_special_tokens=False)
    n_tail = len(together)
    assert together == prompt.prompt.tokens[-n_tail:].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_seed_draws_everything_but_natural_text(made: Made, name: str) -> None:
    assert same(made(name), made(name, seed=1)) == (name not in DRAWN)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_different_index_ask_for_different_things(made: Made, texts: Texts, name: str) -> None:
    questions = {texts(made(name, index))[0] for index in range(4)}
    assert len(questions) == 4


def test_prompt_depends_on_neither_the_count_nor_the_other_tasks(
    made: Made, tokenizer: PreTrainedTokenizerBase
) -> None:
    together = task_prompts(tokenizer, list(TASKS), n_prompts=3, context_tokens=1024)
    assert [made.prompt.name for made in together] == [f"{name}-{i:03d}" for i in range(3) for name in TASKS]
    assert all(same(made(name, 2), prompt) for name, prompt in zip(TASKS, together[-len(TASKS) :], strict=True))


def test_bos_of_the_tokenizer_is_the_first_token_and_counts(bos_tokenizer: PreTrainedTokenizerBase) -> None:
    for made in task_prompts(bos_tokenizer, list(TASKS), n_prompts=1, context_tokens=1024):
        prompt = made.prompt
        assert np.flatnonzero(prompt.tokens == bos_tokenizer.bos_token_id).tolist() == [0]
        assert prompt.n_prompt_tokens == 1024 or (prompt.kind in OF_ITEMS and 972 < prompt.n_prompt_tokens < 1024)


def test_every_prompt_says_where_its_text_comes_from(tokenizer: PreTrainedTokenizerBase) -> None:
    for made in task_prompts(tokenizer, list(TASKS), n_prompts=1, context_tokens=1024):
        is_essay = "needle" in made.prompt.kind or made.prompt.kind in {"prose", "several_questions", "word_list"}
        assert ("Paul Graham" in made.prompt.source) == is_essay
        assert made.prompt.licence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["poem"]}, "the task 'poem' is unknown: use some of single_needle, multi_key_needle"),
        ({"names": ["prose", "prose"]}, r"each task once, not \['prose', 'prose'\]"),
        ({"names": []}, "names must be some of single_needle"),
        ({"n_prompts": 0}, "n_prompts must be at least 1, not 0"),
        ({"n_steps": 0}, "n_steps must be at least 1, not 0"),
        ({"first_index": -1}, "first_index must be at least 0, not -1"),
        ({"context_tokens": 127}, "context_tokens must be at least 128, not 127"),
    ],
)
def test_arguments_out_of_range_are_refused(
    tokenizer: PreTrainedTokenizerBase, changes: dict[str, object], message: str
) -> None:
    arguments = {"names": ["prose"], "n_prompts": 1, "context_tokens": 256} | changes
    with pytest.raises(ValueError, match=message):
        task_prompts(tokenizer, **arguments)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_too_short_a_context_is_answered_with_a_length_that_does(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    def make(context_tokens: int) -> TaskPrompt:
        corpora = {}

        def texts(source: object) -> TokenisedCorpus:
            return corpora.setdefault(source, TokenisedCorpus(source(), tokenizer))

        # Not through `task_prompts`, which has a least length of its own.
        return TASKS[name].make(PromptRequest(name, 0, context_tokens, 64, 0, tokenizer, texts))

    with pytest.raises(
        ValueError, match=rf"^the task {name} needs a context of at least \d+ tokens, not 40$"
    ) as caught:
        make(40)
    n_needed = int(str(caught.value).split()[9])
    assert make(n_needed + 10).prompt.n_prompt_tokens > 40
