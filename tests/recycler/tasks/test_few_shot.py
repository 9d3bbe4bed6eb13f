"""Examples say what a label means, alike often, and never the answer itself."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from recycler.tasks import TASKS, TaskPrompt
from recycler.tasks.few_shot import _SUBJECTS

Made = Callable[..., TaskPrompt]
Texts = Callable[[TaskPrompt], tuple[str, str]]


def parsed(question: str) -> tuple[list[tuple[str, str]], str]:
    """The examples, each a sentence with its label, and the sentence asked about."""
    examples = re.findall(r"Sentence: (.*)\nLabel: (\w+)\n", question)
    return examples, re.findall(r"Sentence: (.*)\nLabel:$", question)[0]


def subject_of(sentence: str) -> int:
    fitting = [
        i
        for i, subject in enumerate(_SUBJECTS)
        for pattern in subject.patterns
        if re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(.*)"), sentence)
    ]
    assert len(fitting) == 1
    return fitting[0]


@pytest.mark.parametrize("index", range(5))
def test_every_label_stands_for_one_subject_and_the_answer_for_its_own(made: Made, texts: Texts, index: int) -> None:
    question, answer = texts(made("few_shot", index))
    examples, asked = parsed(question)
    label_of = {subject_of(sentence): label for sentence, label in examples}
    assert {(subject_of(sentence), label) for sentence, label in examples} == set(label_of.items())
    assert len(set(label_of.values())) == 5
    assert label_of[subject_of(asked)] == answer.strip()


def test_labels_are_balanced_and_dealt_anew(made: Made, texts: Texts) -> None:
    dealt = set()
    for index in range(4):
        examples, _ = parsed(texts(made("few_shot", index, context_tokens=2048))[0])
        counts = Counter(label for _, label in examples)
        assert max(counts.values()) - min(counts.values()) <= 1
        dealt.add(tuple(sorted({(label, subject_of(sentence)) for sentence, label in examples})))
    assert len(dealt) > 1


def test_sentence_asked_about_is_no_example(made: Made, texts: Texts) -> None:
    # So many examples that most sentences there are occur.
    for index in range(3):
        examples, asked = parsed(texts(made("few_shot", index, context_tokens=16_000))[0])
        assert len(examples) > 500
        assert asked not in {sentence for sentence, _ in examples}


def test_only_the_first_word_counts(made: Made, texts: Texts) -> None:
    prompt = made("few_shot")
    label = texts(prompt)[1].strip()
    assert prompt.score(f" {label.upper()}\nSentence: and so on") == 1
    assert prompt.score(f" not {label}") == 0
    assert TASKS["few_shot"].chance == 0.2
