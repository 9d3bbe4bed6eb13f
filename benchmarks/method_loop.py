"""Methods that choose what to attend to at every step, along texts that are given, as closed loops are of policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from full_attention import full_log_p, tokens_of
from tqdm import tqdm

from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.evaluate.method import Method
from recycler.measure.closed_loop import ClosedLoop, follow
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt

# Prompts of one run, a row each.
_AT_ONCE = 12


def method_loops(folder: Path, loaded: LoadedModel, prompts: Sequence[Prompt], method: Method) -> list[ClosedLoop]:
    """Feed prompts' texts to a method, a row each; kept in a folder, as other loops are.

    Args:
        folder: Of a `Store`.
        loaded: The model.
        prompts: Of one length.
        method: What decodes.

    Returns:
        One for each prompt, without the axis of policies.
    """
    found = []
    for begin in tqdm(range(0, len(prompts), _AT_ONCE), method.name):
        some = prompts[begin : begin + _AT_ONCE]
        depends_on = {
            "method loops of": [digest_of_tokens(prompt.tokens) for prompt in some],
            "n_prompt_tokens": some[0].n_prompt_tokens,
            "method": method.settings(),
        }
        arrays = Store(folder).get(loaded, depends_on, partial(_arrays, loaded, some, method))
        found += [ClosedLoop(**{name: array[row] for name, array in arrays.items()}) for row in range(len(some))]
    return found


@torch.no_grad()
def _arrays(loaded: LoadedModel, prompts: Sequence[Prompt], method: Method) -> dict[str, np.ndarray]:
    n, n_steps = prompts[0].n_prompt_tokens, prompts[0].n_steps
    texts = [tokens_of(loaded, prompt) for prompt in prompts]
    full = [full_log_p(loaded, prompt) for prompt in prompts]
    queries = (method.prompt_queries,)
    read = [read_prompt(loaded.model, text[:n], n_steps, prompt_queries=queries) for text in texts]
    rows = method.begin(loaded.model, ReadPrompt.side_by_side(read))
    del read
    text = torch.stack(texts)[:, n:]
    found = follow(rows, text, lambda step, _: torch.stack([of[step] for of in full]), desc=method.name)
    return {field.name: getattr(found, field.name) for field in fields(ClosedLoop)}
