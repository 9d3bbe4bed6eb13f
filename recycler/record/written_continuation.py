"""Prompts whose continuation is the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from recycler.model.generation import generate_tokens
from recycler.model.loading import LoadedModel
from recycler.model.shape import check_positions
from recycler.prompts import Prompt


def with_written_continuation(loaded: LoadedModel, texts: Sequence[Prompt], n_steps: int) -> list[Prompt]:
    """Let the model continue texts, greedily and with full attention.

    Args:
        loaded: The model.
        texts: Each is taken whole, its own continuation included, for the prompt.
        n_steps: Tokens to write, at least 1; the model is not allowed to end earlier.

    Returns:
        Prompts of the same names that end in what the model wrote.

    Raises:
        ValueError: If the model has too few positions for a text and its continuation.
    """
    for text in texts:
        check_positions(loaded.model, len(text.tokens), n_steps)
    written = []
    for text in tqdm(texts, desc="continuing", unit="prompt"):
        generation = generate_tokens(loaded.model, text.tokens.tolist(), max_new_tokens=n_steps, min_new_tokens=n_steps)
        written.append(
            replace(
                text,
                tokens=np.concatenate([text.tokens, generation.tokens]),
                n_prompt_tokens=len(text.tokens),
                source=f"{text.source}, continued by {loaded.id}",
            )
        )
    return written
