"""What full attention predicts along texts that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recycler.model.loading import LoadedModel
from recycler.model.prefill import prefill
from recycler.prompts import Prompt


def tokens_of(loaded: LoadedModel, prompt: Prompt) -> Tensor:
    """The prompt and its continuation, int64 `(tokens,)`, where the model is."""
    return torch.as_tensor(prompt.tokens.astype("int64"), device=loaded.model.device)


@torch.no_grad()
def full_log_p(loaded: LoadedModel, prompt: Prompt) -> Tensor:
    """Log-probabilities after each token of a prompt's continuation, `(steps, vocabulary)`."""
    model: Any = loaded.model
    tokens, n = tokens_of(loaded, prompt)[None], prompt.n_prompt_tokens
    logits: Tensor = model(tokens[:, n:], past_key_values=prefill(loaded.model, tokens[:, :n])).logits[0]
    return logits.log_softmax(-1)
