"""`python benchmarks/governed.py`: does a governed budget hold its limit, and what does it cost?

The default model along held-out texts of six kinds, with the exported policy: audited alone, governed at some limits,
and with fixed budgets, so that the cheapest of these which holds the limit in hindsight is known. KL is audited, every
64 steps: that of each decoded token to full attention over the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import machine_name
from tqdm import tqdm

from policies import BudgetConstrained, PolicyFile
from recycler import Receipt, default_prompts, load_model, recycled
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_DOCS = Path(__file__).parents[1] / "docs"


def main(
    policy: Annotated[Path, typer.Option(help="Policy file.")] = _DOCS / "results/policy-budget-0.1-512-steps.json",
    limits: Annotated[str, typer.Option(help="Nats, by commas.")] = "0.01,0.03",
    fixed: Annotated[str, typer.Option(help="Fixed budgets, in parts of the policy's own, by commas.")] = "0.1,0.3,2,4",
    most: Annotated[float, typer.Option(help="Largest governed budget.")] = 0.4,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.", min=64)] = 1536,
    steps: Annotated[int, typer.Option(help="Decode steps, a multiple of 64.", min=64)] = 512,
    first_index: Annotated[int, typer.Option(help="Of the prompts; make optimize takes the first ones.", min=0)] = 20,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _DOCS / "results/governed.json",
) -> dict[str, Any]:
    """Measure all ways along all texts."""
    loaded, file = load_model(None), PolicyFile.read(policy)
    assert isinstance(file.policy, BudgetConstrained)
    sizes = {"n_per_kind": 1, "context_tokens": context_tokens, "n_steps": steps}
    prompts = default_prompts(loaded.tokenizer, **sizes, first_index=first_index)
    ways: dict[str, dict[str, Any]] = {"the policy as it is": {}}
    ways |= {f"governed at {limit} nats": {"govern_kl": float(limit), "most": most} for limit in limits.split(",")}
    policies = {f"{part} of its budget": file.policy.scaled(float(part)) for part in fixed.split(",")}
    found: dict[str, dict[str, Receipt]] = {name: {} for name in (*ways, *policies)}
    for prompt in tqdm(prompts, "prompts"):
        tokens = torch.as_tensor(prompt.tokens.astype("int64"))[None]
        for name in found:
            decides = policies.get(name, file.policy)
            found[name][prompt.kind] = _along(loaded.model, tokens, context_tokens, decides, file, ways.get(name, {}))
        write_text(out, json.dumps(_result(loaded.id, found, steps, context_tokens), indent=1))
    result = _result(loaded.id, found, steps, context_tokens)
    for row in result["rows"]:
        print({name: value for name, value in row.items() if name != "budgets"}, flush=True)
    return {"out": str(out)}


def _along(
    model: Any, tokens: torch.Tensor, n_prompt: int, policy: Any, file: PolicyFile, how: Mapping[str, Any]
) -> Receipt:
    """Decode along a text, and hear what audits say."""
    with torch.inference_mode(), recycled(model, policy, file.selection, audit=64, **how) as session:
        cache = model(tokens[:, :n_prompt], use_cache=True, logits_to_keep=1).past_key_values
        for at in range(n_prompt, tokens.shape[1]):
            model(tokens[:, at : at + 1], past_key_values=cache)
    return session.receipt()


def _result(model: str, found: Mapping[str, Mapping[str, Receipt]], steps: int, context_tokens: int) -> dict[str, Any]:
    rows = []
    for name, receipts in found.items():
        for kind, receipt in receipts.items():
            assert receipt.audit is not None
            rows.append(
                {
                    "way": name,
                    "kind": kind,
                    "kl_mean": round(receipt.audit["kl_mean"], 5),
                    "kl_p95": round(receipt.audit["kl_p95"], 5),
                    "full_share": round(receipt.full_share, 4),
                    "read_share": round(receipt.read_share, 4),
                    "budgets": [round(window.budget, 4) for window in receipt.governed],
                }
            )
    return {
        "model": model,
        "machine": machine_name(),
        "context_tokens": context_tokens,
        "steps": steps,
        "rows": rows,
        "versions": versions(),
    }


if __name__ == "__main__":
    run_command(main)
