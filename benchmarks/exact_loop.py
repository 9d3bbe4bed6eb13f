"""Exact decoding of a text that is given, as closed loops are of policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_attention import full_log_p, tokens_of

from policies import Selection, StepPolicy, policy_to_json
from policies.serialize import stop_to_json
from policies.stops import StopRule
from recycler.decode.recycled import recycled
from recycler.measure.closed_loop import ClosedLoop
from recycler.measure.store import Store, digest_of_tokens
from recycler.model.divergence import kl_divergence
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt


def exact_loop(
    folder: Path, loaded: LoadedModel, prompt: Prompt, policy: StepPolicy, selection: Selection, stop: StopRule
) -> ClosedLoop:
    """Feed a text token by token, whatever the model would write; kept in a folder, as other loops are.

    What was read for a step is read for several at once: shares of every step are the means of all.

    Args:
        folder: Of a `Store`.
        loaded: The model.
        prompt: Its continuation is the text.
        policy: Who drafts.
        selection: How sets are chosen.
        stop: When a round ends.

    Returns:
        Without the axis of policies.
    """
    depends_on = {
        "exact loop of": digest_of_tokens(prompt.tokens),
        "n_prompt_tokens": prompt.n_prompt_tokens,
        "policy": policy_to_json(policy),
        "selection": selection.to_json(),
        "stop": stop_to_json(stop),
    }
    arrays = Store(folder).get(loaded, depends_on, lambda: _arrays(loaded, prompt, policy, selection, stop))
    return ClosedLoop(**arrays)


@torch.no_grad()
def _arrays(
    loaded: LoadedModel, prompt: Prompt, policy: StepPolicy, selection: Selection, stop: StopRule
) -> dict[str, np.ndarray]:
    model: Any = loaded.model
    full = full_log_p(loaded, prompt)
    tokens, n = tokens_of(loaded, prompt)[None], prompt.n_prompt_tokens
    with recycled(loaded, policy, selection, exact=stop) as session:
        cache = model(tokens[:, :n], use_cache=True, logits_to_keep=1).past_key_values
        fed = [model(tokens[:, at : at + 1], past_key_values=cache) for at in range(n, tokens.shape[1])]
        found = torch.cat([step.logits[0] for step in fed]).log_softmax(-1)
    receipt = session.receipt()
    steps, best = len(found), found.argmax(-1)
    # The last step's next token is not in the text.
    follows = np.append((best[:-1] == tokens[0, n + 1 :]).cpu().numpy(), False)
    return {
        "kl": kl_divergence(full, found).double().clamp(min=0).cpu().numpy(),
        "agreement": (best == full.argmax(-1)).cpu().numpy(),
        "accuracy": follows,
        "full": np.tile(receipt.unit_full_share, (steps, 1, 1)),
        "read_share": np.full(steps, receipt.read_share),
    }
