"""What `benchmarks/decode.py` measures unless options say otherwise: models, policies, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import random_model
from transformers import PreTrainedModel

from policies import BudgetConstrained, CosineThreshold, PolicyFile, Selection, StepPolicy
from recycler import default_prompts, load_model

_PROMPT_TOKENS = 2048
_TUNED = Path(__file__).parents[1] / "docs/results/policy-budget-0.1-512-steps.json"


@dataclass(frozen=True)
class Usual:
    """What is measured unless options say otherwise.

    Attributes:
        dtype: Of the model.
        batches: Rows, one number per measurement.
        contexts: Tokens of context, likewise.
        k: Tokens of a set.
        rounds: Through all cases.
    """

    dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    k: int
    rounds: int

    def pairs(self, batches: str | None, contexts: str | None) -> list[tuple[int, int]]:
        """Rows and contexts to measure: those asked for, all with all, or the usual ones."""
        if batches is None and contexts is None:
            return list(zip(self.batches, self.contexts, strict=True))
        rows = sorted(set(self.batches)) if batches is None else _numbers(batches, "--batches")
        tokens = sorted(set(self.contexts)) if contexts is None else _numbers(contexts, "--contexts")
        return [(batch, context) for batch in rows for context in tokens]


USUAL = {
    "cpu": Usual("float32", (1, 1, 1, 4, 4), (2000, 8000, 32000, 2000, 8000), 512, 5),
    # What there are targets for; more takes more than the ten minutes for which a GPU is lent.
    "cuda": Usual("bfloat16", (1, 1, 8), (4096, 131072, 65536), 2048, 3),
}


@dataclass(frozen=True)
class Subject:
    """A model, some tokens to fill its cache with, and a policy for it.

    Attributes:
        name: What to call the model.
        model: The model.
        tokens: int64 `(1, n)`.
        policy: With decisions of its own.
        policy_name: What it is.
        selection: Of the policy, at its own k; None for the default one.
    """

    name: str
    model: PreTrainedModel
    tokens: torch.Tensor
    policy: StepPolicy
    policy_name: str
    selection: Selection | None = None


def cosine_under(budget: float) -> StepPolicy:
    """Reads the query at every step and layer, and is held to its budget by its accounts alone.

    Random weights turn queries away at random, so no threshold would do.
    """
    return BudgetConstrained(CosineThreshold(1.0), budget)


def subject_of(
    model: str | None,
    shape: str | None,
    dtype: str,
    device: str | None,
    policy: Path | None,
    prompt_tokens: int = _PROMPT_TOKENS,
) -> Subject:
    if shape is not None:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        made = random_model(shape, dtype, where)
        tokens = torch.randint(made.config.vocab_size, (1, prompt_tokens), device=where)
        return Subject(
            f"random weights in the shape of {shape}", made, tokens, cosine_under(0.1), "cosine under a budget"
        )
    loaded = load_model(model, dtype=dtype, device=device)
    prompt = default_prompts(
        loaded.tokenizer, n_per_kind=1, context_tokens=prompt_tokens, n_steps=1, kinds=["technical"]
    )[0]
    tokens = torch.as_tensor(prompt.tokens[:prompt_tokens].astype("int64"), device=loaded.model.device)[None]
    file = PolicyFile.read(policy or _TUNED)
    return Subject(loaded.id, loaded.model, tokens, file.policy, "tuned policy", file.selection)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes whole numbers by commas, such as 2000,8000, not {text!r}.") from error
    if min(numbers) < 1:
        raise ValueError(f"{option} takes numbers from 1 on, not {min(numbers)}.")
    return numbers
