"""What a prompt is, and how one is made of a user's own text."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from recycler.prompts.texts import leading_tokens, text_tokens

# A shorter context says nothing about a method that keeps a part of the context.
_MIN_CONTEXT_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens to read at once, followed by the tokens to be teacher-forced step by step.

    Attributes:
        name: file-name safe, unique among the prompts it is used with, such as "prose-000".
        kind: what sort of text it is: one of ``KINDS``, "user", or a kind of one's own.
        tokens: (n_tokens,) int32, read-only; the prompt followed by its continuation. Any array or
            sequence of token ids is taken and copied.
        n_prompt_tokens: how many of `tokens` are the prompt, in [1, n_tokens).
        source: where the text comes from.
        licence: under which terms the text may be used.
        events: decode steps, rising, whose token is the first of a part of the continuation that needs another place
            of the context; empty where the generator knows of none.

    Raises:
        ValueError: an attribute is outside of what is said above.
    """

    name: str
    kind: str
    tokens: npt.NDArray[np.int32]
    n_prompt_tokens: int
    source: str
    licence: str
    events: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"the prompt name {self.name!r} must be letters, digits, '.', '_' or '-'")
        given = np.asarray(self.tokens)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"the tokens of prompt {self.name} must be a 1-D array of integers, "
                f"not of shape {given.shape} and dtype {given.dtype}"
            )
        if not 1 <= self.n_prompt_tokens < given.size:
            raise ValueError(
                f"prompt {self.name} has {given.size} tokens, so n_prompt_tokens must lie in "
                f"[1, {given.size - 1}], not be {self.n_prompt_tokens}"
            )
        if given.min() < 0 or given.max() > np.iinfo(np.int32).max:
            raise ValueError(f"prompt {self.name} has tokens outside of [0, 2**31)")
        events = tuple(self.events)
        if any(later <= event for event, later in itertools.pairwise((-1, *events, self.n_steps))):
            raise ValueError(f"events of prompt {self.name} must rise within its {self.n_steps} steps, not be {events}")
        object.__setattr__(self, "events", events)
        tokens = given.astype(np.int32)
        tokens.setflags(write=False)
        object.__setattr__(self, "tokens", tokens)

    @property
    def n_steps(self) -> int:
        """Tokens in the continuation: one decode step each."""
        return len(self.tokens) - self.n_prompt_tokens


def prompts_from_files(
    paths: Sequence[str | PathLike[str]], tokenizer: PreTrainedTokenizerBase, n_steps: int, max_tokens: int
) -> list[Prompt]:
    """Make one prompt of kind "user" of each UTF-8 text file.

    Args:
        paths: the files, in the order of the prompts: "user-000", "user-001" and so on.
        tokenizer: the model's tokenizer. A token that it puts first (a BOS) is put first here too.
        n_steps: tokens at the end of each text that become the continuation; at least 1.
        max_tokens: the most tokens that a text may have: the model's positions.

    Returns:
        One prompt per file, the whole text of it.

    Raises:
        ValueError: a file cannot be read as UTF-8, or its text has fewer than ``n_steps + 32``
            tokens or more than `max_tokens`; or `n_steps` is below 1.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}")
    return [
        _prompt_from_file(f"user-{index:03d}", Path(path), tokenizer, n_steps, max_tokens)
        for index, path in enumerate(paths)
    ]


def _prompt_from_file(
    name: str, path: Path, tokenizer: PreTrainedTokenizerBase, n_steps: int, max_tokens: int
) -> Prompt:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text: byte {error.start} is invalid") from error
    except OSError as error:
        raise ValueError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    tokens = [*leading_tokens(tokenizer), *text_tokens(tokenizer, text)]
    n_needed = n_steps + _MIN_CONTEXT_TOKENS
    if len(tokens) < n_needed:
        raise ValueError(
            f"the prompt file {path} has {len(tokens)} tokens, and {n_steps} steps need a text of at least {n_needed}"
        )
    if len(tokens) > max_tokens:
        raise ValueError(f"the prompt file {path} has {len(tokens)} tokens, and the model takes at most {max_tokens}")
    return Prompt(
        name=name,
        kind="user",
        tokens=np.array(tokens),
        n_prompt_tokens=len(tokens) - n_steps,
        source=fspath(path),
        licence="as given by the user",
    )
