"""How far decoding is from full attention, measured: a full forward over the last tokens, every so many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from recycler.decode.cache import KvLayer
from recycler.decode.cache_watch import CACHE_CHANGED
from recycler.decode.forward_call import ForwardCall
from recycler.model.decoder_parts import NotCovered
from recycler.model.divergence import kl_divergence


class Audited(NamedTuple):
    """What an audit found.

    Attributes:
        kl: float32 `(rows, steps)`: Kullback-Leibler divergence of the next token's distribution from that of full
            attention over the same text, in nats, at least 0.
        tokens_read: Tokens of the cache that a unit read for it, summed over rows; each once, for all of its queries.
        bad_rows: bool `(rows,)`: rows with a NaN among the logits of full attention.
    """

    kl: np.ndarray
    tokens_read: int
    bad_rows: Tensor


class Auditor:
    """Keeps the last steps, and repeats them with full attention.

    The keys and values of their tokens become those of full attention. Where all steps are repeated, what was decoded
    before has been audited, so that every audit is of the whole text; a sample is of its steps after a text as it is.

    Args:
        every_steps: Steps from one audit to the next, at least 1.
        n_tokens: How many of them are repeated, the last ones; None for all.

    Raises:
        ValueError: If one is no whole number from 1 on, or more are to be repeated than there are.
    """

    def __init__(self, every_steps: int, n_tokens: int | None = None) -> None:
        if not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"audit must be at least 1 step, or None for no audits, not {every_steps}.")
        if n_tokens is not None and (not isinstance(n_tokens, int) or not 1 <= n_tokens <= every_steps):
            raise ValueError(
                f"audit_tokens must be from 1 to audit={every_steps}, whose last steps it repeats, or None for all of "
                f"them, not {n_tokens}."
            )
        self._every_steps, self._n_tokens = every_steps, every_steps if n_tokens is None else n_tokens
        self._n_steps = 0
        self._tokens: list[Tensor] = []
        self._places: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._last: ForwardCall | None = None
        self._cache_tokens = 0

    @property
    def is_due(self) -> bool:
        """Whether as many steps were taken as there are from one audit to the next."""
        return self._n_steps == self._every_steps

    @property
    def note(self) -> str:
        """What a receipt says of audits that are not of all steps; else empty."""
        if self._n_tokens == self._every_steps:
            return ""
        return (
            f"audits are of a sample, {self._n_tokens} of every {self._every_steps} steps: the others' keys and values "
            "are as recycled attention left them."
        )

    def check(self, call: ForwardCall) -> None:
        """Refuse what cannot be repeated.

        Raises:
            ValueError: If tokens cannot be taken back from the cache, the cache did anything but grow by the steps that
                were kept, or the call has arguments that an audit would leave out.
        """
        cache = call.arguments.get("past_key_values")
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"an audit takes tokens back from the cache, which a {type(cache).__name__} does not allow."
            )
        try:
            call.check()
        except NotCovered as reason:
            raise ValueError(f"an audit cannot repeat this step: {reason}.") from reason
        if self._last is None:
            for layer in cache.layers:
                if type(layer) not in (DynamicLayer, KvLayer):
                    raise ValueError(
                        f"an audit takes tokens back from the cache, and a {type(layer).__name__} has forgotten what "
                        "was before them."
                    )
            return
        if cache is not self._last.arguments["past_key_values"] or cache.get_seq_length() != self._cache_tokens:
            raise ValueError(CACHE_CHANGED)
        if (call.arguments.get("position_ids") is None) != (self._last.arguments.get("position_ids") is None):
            raise ValueError("an audit repeats steps that all come with position_ids, or all without.")

    def keep(self, call: ForwardCall, logits: Tensor) -> None:
        """Keep a step, if it will be repeated.

        Args:
            call: The call of the forward.
            logits: `(rows, 1, vocabulary)`, which it returned.
        """
        self._n_steps += 1
        self._last, self._cache_tokens = call, call.arguments["past_key_values"].get_seq_length()
        if self._n_steps <= self._every_steps - self._n_tokens:
            return
        # Copies: a caller may use one buffer for all steps, and change logits where they are.
        self._tokens.append(call.tokens.clone())
        places = call.arguments.get("position_ids")
        if places is not None:
            self._places.append(places.clone())
        self._logits.append(logits[:, -1].detach().clone())

    def forget(self) -> None:
        """Forget what was not audited."""
        self._tokens, self._places, self._logits, self._last, self._n_steps = [], [], [], None, 0

    def run(
        self, forward: Callable[..., Any], repeat: Callable[[Tensor, Tensor | None], Tensor] | None = None
    ) -> Audited:
        """Repeat what was kept, and forget it.

        Args:
            forward: The model's own, with full attention.
            repeat: What gives the same logits for tokens and positions, and sees to the cache itself; None if only the
                model's forward does.
        """
        assert self._last is not None
        cache, mask = (self._last.arguments.get(name) for name in ("past_key_values", "attention_mask"))
        tokens, found, n_steps = torch.cat(self._tokens, 1), self._logits, len(self._tokens)
        # Positions that were left to the model are left to it again.
        places = {"position_ids": torch.cat(self._places, -1)} if self._places else {}
        self.forget()
        with torch.no_grad():
            if repeat is not None:
                exact = repeat(tokens, places.get("position_ids"))
            else:
                for layer in cache.layers:  # type: ignore[union-attr]
                    take_back(layer, n_steps)
                exact = forward(
                    input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **places
                ).logits
            kl = torch.stack([_divergence(exact[:, step], one) for step, one in enumerate(found)], 1)
        held = cache.get_seq_length() * len(tokens)  # type: ignore[union-attr]
        padding = 0 if mask is None else int((mask == 0).sum())
        return Audited(kl.float().cpu().numpy(), held - padding, exact.amax(-1).isnan().any(-1))


def take_back(layer: Any, n_tokens: int) -> None:
    """Take the last tokens out of a layer of a cache, without copying the rest where it grows in place."""
    if isinstance(layer, KvLayer) and all(part.n_own >= n_tokens for part in layer.parts):
        for part in layer.parts:
            part.n_own -= n_tokens
    else:
        layer.crop(-n_tokens)


def _divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) of logits `(rows, vocabulary)`, in nats, `(rows,)`, at least 0; in float32 or wider."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    return kl_divergence(*(logits.to(wide).log_softmax(-1) for logits in (exact, other))).clamp(min=0)
