"""Token ids that a model has."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


def n_vocabulary(model: PreTrainedModel) -> int | None:
    """How many token ids a model has; None if it is around a text model, and may have more of them, as for images."""
    config = model.config.get_text_config(decoder=True)
    return int(config.vocab_size) if config is model.config else None


def check_tokens(tokens: Tensor | None, n_ids: int | None) -> None:
    """Refuse ids outside of a model's vocabulary; on a GPU, which would have to wait, the model itself does.

    Args:
        tokens: Whole numbers of any shape; None for embeddings, which are no ids.
        n_ids: How many ids there are; None if that is not known.

    Raises:
        ValueError: With the first id that is outside.
    """
    if tokens is None or n_ids is None or tokens.device.type != "cpu" or not tokens.numel():
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= n_ids:
        wrong = low if low < 0 else high
        raise ValueError(f"the token id {wrong} is outside of the model's vocabulary, 0 to {n_ids - 1}.")
