"""What must not happen to a cache between two decode steps."""

from __future__ import annotations

import torch
from torch import Tensor

from recycler.model.decoder_parts import NotCovered

CACHE_CHANGED = (
    "the KV cache changed between two decode steps (rows reordered, tokens removed, or another cache): "
    "beam search and assisted decoding cannot run recycled; use greedy search or sampling."
)


def other_padding(row: int) -> str:
    """What to say of a mask that is not that of the prompt plus new tokens."""
    return (
        f"row {row} of the batch has masked tokens after its first visible one, or another mask than in prefill: "
        "recycled attention allows padding on the left only."
    )


def _same(key: Tensor, other: Tensor) -> bool:
    """Whether keys are equal; a NaN in a row is one that stayed, and no reason to stop the others."""
    return torch.equal(key, other) or bool(((key == other) | (key.isnan() & other.isnan())).all())


class CacheWatch:
    """Notices when a layer's cache did anything but grow by the token of this step.

    Sets name places in the cache, so rows that move or tokens that vanish would silently turn them into other tokens.
    """

    def __init__(self, key: Tensor, start: Tensor | int) -> None:
        self._start = start
        self._remember(key)

    def check(self, key: Tensor | None) -> None:
        """Raise unless the keys are those seen last.

        Raises:
            NotCovered: If these are other numbers than attention reads, as the latents of MLA (arXiv 2405.04434) are.
            ValueError: If they are not.
        """
        if key is not None and (key.shape[1], key.shape[3]) != self._last_key.shape[1:]:
            raise NotCovered("its cache holds something else than the keys that attention reads")
        same = key is not None and key.shape[0] == self._last_key.shape[0] and key.shape[2] >= self._end > 0
        if key is None or not same or not _same(key[:, :, self._end - 1], self._last_key):
            raise ValueError(CACHE_CHANGED)

    def follow(self, key: Tensor, visible: Tensor | None) -> None:
        """Raise unless the last token seen is still in its place, one more has come, and padding is what it was."""
        same_shape = key.shape[0] == self._last_key.shape[0] and key.shape[2] == self._end + 1
        if not same_shape or not _same(key[:, :, -2], self._last_key):
            raise ValueError(CACHE_CHANGED)
        if visible is not None or not isinstance(self._start, int):
            self._refuse_other_padding(
                torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if visible is None else visible
            )
        self._remember(key)

    def _refuse_other_padding(self, visible: Tensor) -> None:
        start = self._start if isinstance(self._start, int) else self._start[:, 0]
        expected = torch.arange(visible.shape[1], device=visible.device) >= start
        wrong = (visible != expected).any(-1)
        if wrong.any():
            raise ValueError(other_padding(int(wrong.int().argmax())))

    def _remember(self, key: Tensor) -> None:
        self._end = key.shape[2]
        self._last_key = key[:, :, -1].clone()
