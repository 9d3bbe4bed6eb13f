"""Decoding with a policy by transformers' own ways to bring one's own `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils.hub import cached_file

from policies import PolicyFile, Selection, StepPolicy
from policies.stops import StopRule
from recycler.decode.recycled import recycled
from recycler.decode.session import Session
from recycler.model.attention_hook import owner_here, refuse_batches

_LOGGER = logging.getLogger("recycler")
POLICY_NAME = "policy.json"


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    policy: StepPolicy | PolicyFile | str | Path | None = None,
    selection: Selection | None = None,
    fast: bool = True,
    exact: bool | StopRule = False,
    audit: int | None = None,
    audit_tokens: int | None = None,
    govern_kl: float | None = None,
    most: float | None = None,
    **model_kwargs: Any,
) -> Any:
    """What to give to `model.generate(..., custom_generate=custom_generate, policy=...)`.

    transformers prepares the call and gives it to this instead of its own loop. It does not pass a streamer on: put
    `with recycled(...)` around the call where text is to come as it is written. The receipt goes to the logger
    `recycler`, at level INFO.

    Args:
        model: As transformers gives it, like what follows.
        input_ids: int64 `(rows, tokens)`.
        logits_processor: What changes logits.
        stopping_criteria: What ends a text.
        generation_config: All settings.
        policy: As in `recycled`; from the call of `generate`, like what follows.
        selection: As in `recycled`.
        fast: As in `recycled`.
        exact: As in `recycled`.
        audit: As in `recycled`.
        audit_tokens: As in `recycled`.
        govern_kl: As in `recycled`.
        most: As in `recycled`.
        model_kwargs: What else the model's forward gets.

    Raises:
        ValueError: If no policy is given, beams are asked for, or as `recycled` does.
    """
    if policy is None:
        raise ValueError("custom_generate decodes with a policy: give policy=... to generate, such as its file's path.")
    if (generation_config.num_beams or 1) > 1:
        raise ValueError("beam search cannot run recycled: use greedy search or sampling, with num_beams=1.")
    applied = recycled(
        model,
        policy,
        selection,
        fast=fast,
        exact=exact,
        audit=audit,
        audit_tokens=audit_tokens,
        govern_kl=govern_kl,
        most=most,
    )
    with _told(applied):
        return model._sample(  # type: ignore[operator]
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )


def generate_by_folder(*args: Any, model: PreTrainedModel, **kwargs: Any) -> Any:
    """`generate` of a model whose folder or repository holds a policy (`python -m recycler.export`).

    The receipt goes to the logger `recycler`, at level INFO. Inside a `with recycled(...)` of this thread, that counts
    and not the folder's policy.

    Args:
        args: Of `generate`.
        model: The model; its `name_or_path` leads to the policy.
        kwargs: Of `generate`.

    Raises:
        ValueError: As `recycled` does.
    """
    # Not the model's own attribute, which is what calls this.
    stock = type(model).generate  # type: ignore[attr-defined]
    if owner_here(model) is not None:
        return stock(model, *args, **kwargs)
    with _told(recycled(model, _policy_of(model.name_or_path))):
        return stock(model, *args, **kwargs)


@lru_cache(maxsize=1)
def folder_generate() -> Callable[..., Any]:
    """`generate_by_folder` for the code of a folder.

    From the first call on, models whose `generate` it is refuse continuous batching, which would run them without their
    policy: transformers gives a folder's code no model to tell so before `generate` is called.
    """
    mixin: Any = GenerationMixin
    stock = mixin.init_continuous_batching

    @wraps(stock)
    def init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(vars(model).get("generate"), "func", None) is generate_by_folder:
            refuse_batches()
        return stock(model, *args, **kwargs)

    mixin.init_continuous_batching = init_continuous_batching
    return generate_by_folder


@contextmanager
def _told(session: AbstractContextManager[Session]) -> Iterator[None]:
    """Log the receipt of a session when it has ended."""
    with session as entered:
        yield
    _LOGGER.info("recycled: %s", entered.receipt().to_json())


@lru_cache(maxsize=8)
def _policy_of(name_or_path: str) -> PolicyFile:
    try:
        path = cached_file(name_or_path, POLICY_NAME)
    except OSError as error:
        raise ValueError(f"{name_or_path} holds no {POLICY_NAME}: write it with python -m recycler.export.") from error
    return PolicyFile.read(str(path))
