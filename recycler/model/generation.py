"""Generation of one text, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.model.prefill import PREFILL_CHUNK_TOKENS
from recycler.model.shape import check_positions


class TokenStream(Protocol):
    """What a streamer of transformers can do."""

    def put(self, value: Tensor) -> None:
        """Take the tokens of the prompt, `(1, tokens)`, at first; then one token, `(1,)`, at each call."""

    def end(self) -> None:
        """No more tokens come."""


@dataclass(frozen=True)
class Generation:
    """New tokens and how long they took.

    Attributes:
        tokens: The new tokens, at least one. The first comes out of prefill, each other one out of a decode step.
        prefill_s: Seconds from the start to the first new token.
        decode_s: Seconds from the first new token to the last.
        warming_steps: The first steps, in which an engine gets ready.
        warming_s: Seconds of them.
    """

    tokens: tuple[int, ...]
    prefill_s: float
    decode_s: float
    warming_steps: int = 0
    warming_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Decode steps per second, the warming ones aside; None if there was none."""
        n_steps = len(self.tokens) - 1 - self.warming_steps
        return n_steps / (self.decode_s - self.warming_s) if n_steps else None


def generate_tokens(
    model: PreTrainedModel,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: TokenStream | None = None,
    ends: bool = True,
    warming_steps: int = 0,
) -> Generation:
    """Continue a text with the model as it is, or as a `with recycled(...)` around the call makes it.

    Args:
        model: A causal language model.
        prompt_tokens: The text, at least one token.
        max_new_tokens: Most tokens to add, at least 1; an end-of-text token ends it earlier.
        min_new_tokens: Fewest tokens to add: until then, end-of-text tokens are not chosen.
        temperature: 0 takes the most likely token; above, tokens are drawn from the whole distribution at that
            temperature.
        seed: Of the drawing.
        streamer: Is given the prompt, then each new token as soon as it is known.
        ends: False lets a text go on after what would end it, as after any other token.
        warming_steps: Steps that get an engine ready, as on a GPU the first one, which waits for kernels, and the
            second, which is captured: they are no part of the speed, if there are more.

    Raises:
        ValueError: If the model has too few positions.
    """
    check_positions(model, len(prompt_tokens), max_new_tokens)
    clock = _Clock(streamer)
    tokens = torch.tensor([list(prompt_tokens)], device=model.device)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not ends:
        # An id must be given, and the last one is reserved or rare.
        drawing["eos_token_id"] = int(model.config.vocab_size) - 1
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_beams=1,
            prefill_chunk_size=PREFILL_CHUNK_TOKENS,
            streamer=clock,
            **drawing,
            **_padding(model),
        )
    begin, first, *later = clock.times
    # Of a text of no more steps all count, rather than none.
    warming = warming_steps if len(later) > warming_steps else 0
    return Generation(
        tuple(output[0, len(prompt_tokens) :].tolist()),
        prefill_s=first - begin,
        decode_s=clock.times[-1] - first,
        warming_steps=warming,
        warming_s=later[warming - 1] - first if warming else 0.0,
    )


class _Clock:
    """Notes when the prompt and each new token come by, and hands them on."""

    def __init__(self, inner: TokenStream | None) -> None:
        self.times: list[float] = []
        self._inner = inner

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def _padding(model: PreTrainedModel) -> dict[str, int]:
    """One row needs no padding; `generate` asks for a token all the same, and says so when it has to take one."""
    config = model.generation_config
    if config is None or config.pad_token_id is not None or config.eos_token_id is None:
        return {}
    ends = config.eos_token_id
    return {"pad_token_id": ends if isinstance(ends, int) else ends[0]}
