"""Many labelled sentences, then one whose label is asked for.

After the many-shot classification of HELMET (arXiv 2410.02694): examples fill the context, their labels
are balanced, and only they say what a label means. Deviations: the sentences are made from patterns and
words of five subjects instead of taken from a data set; labels are words that say nothing of the subject,
dealt anew for each prompt, where HELMET has numbers. The sentence asked about is in none of the examples.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from recycler.prompts.request import PromptRequest
from recycler.tasks.scores import first_word
from recycler.tasks.task import Task, TaskPrompt, answered, room_left


@dataclass(frozen=True)
class _Subject:
    """Sentences about one thing: each pattern takes one of either words."""

    patterns: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]

    def sentence(self, rng: random.Random) -> str:
        return rng.choice(self.patterns).format(rng.choice(self.first), rng.choice(self.second))


_SUBJECTS = (
    _Subject(
        (
            "There will be {} over the {} tomorrow.",
            "After a night of {} the {} lay quiet.",
            "The forecast warns of {} near the {}.",
        ),
        ("rain", "snow", "fog", "thunder", "hail", "strong wind", "frost", "drizzle"),
        ("coast", "hills", "valley", "islands", "northern plains", "lake", "mountains", "harbour"),
    ),
    _Subject(
        (
            "She baked {} with a little {}.",
            "The cook served {} and {} for supper.",
            "We ordered {} with plenty of {}.",
        ),
        ("bread", "noodles", "a pie", "pancakes", "soup", "roast lamb", "dumplings", "an omelette"),
        ("garlic", "butter", "cheese", "pepper", "honey", "lemon", "basil", "cream"),
    ),
    _Subject(
        (
            "The orchestra played {} with a solo {}.",
            "He practised {} on the {} all morning.",
            "They recorded {} for voice and {}.",
        ),
        ("a waltz", "a sonata", "a march", "a lullaby", "an old ballad", "the overture", "a fugue", "a hymn"),
        ("violin", "piano", "flute", "trumpet", "cello", "guitar", "clarinet", "harp"),
    ),
    _Subject(
        (
            "The doctor treated {} with {}.",
            "Patients who have {} are often given {}.",
            "The nurse noted {} and prescribed {}.",
        ),
        (
            "a fever",
            "a cough",
            "a sprained ankle",
            "high blood pressure",
            "a rash",
            "a headache",
            "asthma",
            "an infection",
        ),
        (
            "tablets",
            "an ointment",
            "bed rest",
            "antibiotics",
            "a vaccine",
            "a bandage",
            "an injection",
            "physiotherapy",
        ),
    ),
    _Subject(
        (
            "The bank raised {} because of {}.",
            "Investors expect {} after {}.",
            "Shares fell as {} followed {}.",
        ),
        (
            "interest rates",
            "lower profits",
            "higher fees",
            "new loans",
            "smaller dividends",
            "a merger",
            "price cuts",
            "losses",
        ),
        (
            "inflation",
            "the tax reform",
            "weak sales",
            "rising debt",
            "the budget",
            "a market crash",
            "the audit",
            "bankruptcy",
        ),
    ),
)
_LABELS = ("amber", "cobalt", "birch", "velvet", "copper")
_OPENING = "Every sentence has one of five labels. Learn from the examples which.\n\n"


def _make(request: PromptRequest) -> TaskPrompt:
    rng = request.rng()
    subject_of: Mapping[str, _Subject] = MappingProxyType(
        dict(zip(rng.sample(_LABELS, len(_LABELS)), _SUBJECTS, strict=True))
    )
    label = rng.choice(_LABELS)
    asked = subject_of[label].sentence(rng)
    tokens = request.encode(_OPENING)
    question = request.encode(f"Sentence: {asked}\nLabel:")
    n_room = room_left(request, len(tokens) + len(question), 0)
    for n_examples, (sentence, its_label) in enumerate(_examples(subject_of, asked, rng)):
        example = request.encode(f"Sentence: {sentence}\nLabel: {its_label}\n")
        if len(example) > n_room:
            if n_examples < len(_LABELS):
                # About as many more as are missing.
                room_left(request, request.n_context - n_room, (len(_LABELS) - n_examples) * len(example))
            break
        tokens += example
        n_room -= len(example)
    return answered(request, [*tokens, *question], request.encode(f" {label}\n"), partial(first_word, expected=label))


def _examples(subject_of: Mapping[str, _Subject], asked: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Sentences and their labels without end; of any five in turn each has another label."""
    while True:
        for label in rng.sample(_LABELS, len(_LABELS)):
            sentence = asked
            while sentence == asked:
                sentence = subject_of[label].sentence(rng)
            yield sentence, label


FEW_SHOT = Task("few_shot", "HELMET (arXiv 2410.02694), many-shot classification", 1 / len(_LABELS), _make)
