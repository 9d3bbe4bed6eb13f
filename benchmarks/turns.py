"""`python benchmarks/turns.py`: ten turns over one growing cache, as in a chat.

Continuations of default prompts that no tuning saw are cut into turns: some tokens that are said at once, and some that
are answered one by one, teacher-forced inside one `recycled` session with a row per kind of text. KL to full attention
by turn, full share by turn, and what choosing sets adds to reading what was said. Writes `docs/results/turns.json`,
its picture and a section of `docs/long_outputs.md`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from long_outputs_report import page
from machine import machine_name
from transformers import DynamicCache, PreTrainedModel

from policies import FixedStride, PolicyFile, Selection, StepPolicy
from recycler.decode.recycled import recycled
from recycler.model.loading import load_model
from recycler.prompts import KINDS, default_prompts
from traces.reporting import picture_style as style
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_DOCS = Path(__file__).parents[1] / "docs"


def main(
    policy: Annotated[Path, typer.Option(help="Policy file.")] = _DOCS / "results/policy-budget-0.1-512-steps.json",
    turns: Annotated[int, typer.Option(help="Turns.", min=2)] = 10,
    said_tokens: Annotated[int, typer.Option(help="Tokens that a turn begins with.", min=2)] = 32,
    answer_tokens: Annotated[int, typer.Option(help="Tokens that it answers.", min=1)] = 64,
    context_tokens: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 1536,
    per_kind: Annotated[int, typer.Option(help="Conversations per kind.", min=1)] = 2,
) -> dict[str, Any]:
    """Converse, and say how far every turn is from full attention."""
    began = time.perf_counter()
    loaded, file = load_model(None), PolicyFile.read(policy)
    n_steps = turns * (said_tokens + answer_tokens) - said_tokens
    contenders: dict[str, tuple[StepPolicy, Selection]] = {
        "tuned on 512 steps": (file.policy, file.selection),
        "stride 10, pooled": (FixedStride(10), file.selection.pooled()),
    }
    kl: dict[str, list[np.ndarray]] = {name: [] for name in contenders}
    full: dict[str, list[list[float]]] = {name: [] for name in contenders}
    read_ms: dict[str, list[np.ndarray]] = {name: [] for name in (*contenders, "stock")}
    receipts: dict[str, Any] = {}
    for index in range(per_kind):
        prompts = default_prompts(
            loaded.tokenizer, n_per_kind=1, first_index=4 + index, context_tokens=context_tokens, n_steps=n_steps
        )
        text = torch.as_tensor(np.stack([prompt.tokens for prompt in prompts]).astype(np.int64))
        shape = (turns, said_tokens, answer_tokens, context_tokens)
        expected, stock_ms = _converse(loaded.model, text, *shape, at_once=True)
        read_ms["stock"].append(stock_ms)
        for name, (one, selection) in contenders.items():
            with recycled(loaded.model, one, selection) as session:
                found, ms = _converse(loaded.model, text, *shape)
            kl[name].append((expected.exp() * (expected - found)).sum(-1).clamp(min=0).double().numpy())
            full[name].append([receipt.full_share for receipt in session.turns()])
            read_ms[name].append(ms)
            receipts[name] = session.receipt().to_json()
    result: dict[str, Any] = {
        "model": loaded.id,
        "machine": machine_name(),
        "turns": turns,
        "said_tokens": said_tokens,
        "answer_tokens": answer_tokens,
        "context_tokens": context_tokens,
        "conversations": per_kind * len(KINDS),
        "rows": {
            name: {
                # (rows, turns, steps)
                "kl": float(np.mean(kl[name])),
                "kl_by_turn": np.concatenate(kl[name]).mean((0, 2)).round(5).tolist(),
                "full_share_by_turn": np.mean(full[name], axis=0).round(4).tolist(),
                "choosing_ms_by_turn": (np.mean(read_ms[name], axis=0) - np.mean(read_ms["stock"], axis=0))
                .round(1)
                .tolist(),
                "last_receipt": receipts[name],
            }
            for name in contenders
        },
        "reading_ms_by_turn": np.mean(read_ms["stock"], axis=0).round(1).tolist(),
    }
    write_text(_DOCS / "results" / "turns.json", json.dumps(result, indent=1) + "\n")
    _draw(result).savefig(_DOCS / "pictures" / "turns.png", dpi=110)
    write_text(_DOCS / "long_outputs.md", page(_DOCS / "results"))
    print(json.dumps(result["rows"], indent=1))
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _converse(
    model: PreTrainedModel,
    text: torch.Tensor,
    turns: int,
    said_tokens: int,
    answer_tokens: int,
    context_tokens: int,
    *,
    at_once: bool = False,
) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probabilities `(rows, turns, answer_tokens, vocabulary)`, and milliseconds that reading took by turn."""
    cache, at, found, read_ms = DynamicCache(config=model.config), 0, [], []
    with torch.inference_mode():
        for turn in range(turns):
            n_said = said_tokens if turn else context_tokens
            began = time.perf_counter()
            model(text[:, at : at + n_said], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read_ms.append((time.perf_counter() - began) * 1e3)
            at += n_said
            # The prediction after what was said is full attention's; what is compared comes after fed tokens.
            answer = text[:, at : at + answer_tokens]
            if at_once:
                logits = model(answer, past_key_values=cache, use_cache=True).logits
            else:
                steps = [
                    model(answer[:, step : step + 1], past_key_values=cache, use_cache=True).logits
                    for step in range(answer_tokens)
                ]
                logits = torch.cat(steps, dim=1)
            at += answer_tokens
            found.append(logits.log_softmax(-1))
    return torch.stack(found, dim=1), np.array(read_ms)


def _draw(result: dict[str, Any]) -> Any:
    caption = (
        f"{result['model']}, {result['conversations']} conversations: {result['context_tokens']:,} tokens, then "
        f"{result['turns']} turns of {result['said_tokens']} tokens said and {result['answer_tokens']} answered"
    )
    figure = style.new_figure("KL to full attention by turn", caption, (8.6, 4.6))
    axes = figure.add_subplot()
    style.style_axes(axes, "", "turn", "KL (nats per step)")
    rows = result["rows"]
    for (colour, dashes), (name, row) in zip(style.looks(len(rows)), rows.items(), strict=True):
        axes.plot(range(1, result["turns"] + 1), row["kl_by_turn"], dashes, color=colour, label=name)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    run_command(main)
