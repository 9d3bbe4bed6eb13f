"""Command: generate text with a policy, and show the receipt."""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import TextStreamer

from policies import PolicyFile, written_by
from recycler.decode.explain import explain
from recycler.decode.recycled import recycled
from recycler.decode.score import Scored, score
from recycler.model.generation import Generation, generate_tokens
from recycler.model.loading import LoadedModel, load_model
from recycler.prompts.texts import leading_tokens, text_tokens
from traces.reporting.command import run_command

# On a GPU: the first step waits for its kernels, the second is captured.
_WARMING_STEPS = 2


def main(
    policy: Annotated[Path, typer.Option(help="Policy file, as python -m tuning.optimize writes it.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with the prompt; without both, standard input is read.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 256,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or local folder; the model of the policy when not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the model.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device; cuda where there is one, else cpu.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing at a temperature above 0.")] = 0,
    k: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the recycled set, those of units in proportion; default: the policy's."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Write full attention's own text: the policy drafts, full steps verify.")
    ] = False,
    audit: Annotated[
        int | None,
        typer.Option(min=1, help="Measure how far the text is from full attention, every so many tokens."),
    ] = None,
    audit_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Repeat so many of the tokens between two audits, the last ones; default: all."),
    ] = None,
    govern_kl: Annotated[
        float | None,
        typer.Option(help="Hold this KL to full attention, in nats, by audits that steer the policy's budget."),
    ] = None,
    most: Annotated[float | None, typer.Option(help="Largest budget that --govern-kl may use.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Keep to the plain path, without the fast engine.")] = False,
    explain_only: Annotated[
        bool, typer.Option("--explain", help="Say what would run and what it would read, and generate nothing.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Generate with full attention too: speed, and how far the texts are the same."),
    ] = False,
) -> dict[str, Any]:
    """Generate with recycled attention: the text as it comes, then what was really applied."""
    policy_file = PolicyFile.read(policy)
    if k is not None:
        policy_file = policy_file.at_k(k)
    text = _read_prompt(prompt, prompt_file)
    loaded = _load(policy_file.model.id, model, dtype, device)
    tokens = _tokens(loaded, text, chat)
    if explain_only:
        explanation = explain(loaded, policy_file, context_tokens=len(tokens) + max_new_tokens, fast=not plain)
        explanation.print(Console(highlight=False))
        return explanation.to_json()

    def generate(streamer: TextStreamer | None = None) -> Generation:
        return generate_tokens(
            loaded.model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            streamer=streamer,
            # In rounds every step may be a whole round, and none is like another.
            warming_steps=_WARMING_STEPS if loaded.model.device.type == "cuda" and not exact else 0,
        )

    applying = recycled(
        loaded,
        policy_file,
        fast=not plain,
        exact=exact,
        audit=audit,
        audit_tokens=audit_tokens,
        govern_kl=govern_kl,
        most=most,
    )
    with applying as session:
        recycled_run = generate(TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True))
    receipt = session.receipt()
    # Piped, the table is as wide as it needs to be; a terminal has its own width.
    width = None if sys.stdout.isatty() else max(80, 8 + 6 * receipt.full_steps.shape[0])
    receipt.print(Console(highlight=False, width=width))
    applied = receipt.to_json()
    compared: dict[str, Any] = {}
    if compare:
        # What was drawn is chosen by nobody, and what is exact is full attention's.
        follows = temperature == 0 and not exact
        full_run = generate()
        scored = score(loaded, policy_file, tokens, full_run.tokens, fast=not plain) if follows else None
        compared = _compared(recycled_run, full_run, scored)
        print(_compared_sentence(compared))
    return {
        "new_tokens": len(recycled_run.tokens),
        "tokens_per_s": _rounded(recycled_run.tokens_per_s),
        "prefill_tokens": len(tokens),
        "prefill_s": round(recycled_run.prefill_s, 3),
        "full_share": applied["full_share"],
        "keys_only_share": applied["keys_only_share"],
        "read_share": applied["read_share"],
        "engine": applied["engine"],
        "why_plain": applied["why_plain"],
        "reasons": applied["reasons"],
        "horizon_steps": applied["horizon_steps"],
        "notes": applied["notes"],
        "audit": applied["audit"],
        "governed": applied["governed"],
        "rounds": applied["rounds"],
        "written_by": applied["written_by"],
        "model": loaded.id,
        "policy": str(policy),
        **compared,
    }


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("give the prompt by --prompt or by --prompt-file, not both.")
    if prompt is not None:
        text = prompt
    elif file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt file {file} is not UTF-8 text: byte {error.start} is invalid.") from error
        except OSError as error:
            raise ValueError(f"the prompt file {file} cannot be read: {error.strerror}.") from error
    elif sys.stdin.isatty():
        raise ValueError("there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe the text in.")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise ValueError("the prompt is empty.")
    return text


def _load(tuned_on: str, name: str | None, dtype: str, device: str | None) -> LoadedModel:
    loaded = load_model(tuned_on if name is None else name, dtype=dtype, device=device)
    if loaded.id != tuned_on:
        print(f"note: the policy was tuned on {tuned_on}, and runs on {loaded.id}.", file=sys.stderr)
    return loaded


def _tokens(loaded: LoadedModel, text: str, chat: bool) -> list[int]:
    tokenizer = loaded.tokenizer
    if not chat:
        return [*leading_tokens(tokenizer), *text_tokens(tokenizer, text)]
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {loaded.id} has no chat template: leave out --chat.")
    turns = [{"role": "user", "content": text}]
    templated = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text_tokens(tokenizer, str(templated))


def _compared(recycled_run: Generation, full_run: Generation, scored: Scored | None) -> dict[str, Any]:
    """Speed of full attention, and how far the texts are the same.

    `shared_tokens` is how many tokens the two own texts begin with alike: one other token, and they go separate ways.
    `agreement` tells more: along full attention's text, the share of its tokens that the policy's decoding finds most
    likely, which errors of its own text do not come into; None where that says nothing.
    """
    pairs = zip(recycled_run.tokens, full_run.tokens, strict=False)
    return {
        "tokens_per_s_full": _rounded(full_run.tokens_per_s),
        "shared_tokens": len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))),
        "agreement": None if scored is None else float(scored.is_greedy.mean()),
    }


def _compared_sentence(compared: dict[str, Any]) -> str:
    text = f"beside full attention: the two texts share their first {compared['shared_tokens']} tokens"
    if compared["agreement"] is not None:
        text += f"; along full attention's text {compared['agreement']:.1%} of its tokens are chosen"
    return text + "."


def _rounded(per_second: float | None) -> float | None:
    return None if per_second is None else round(per_second, 2)


if __name__ == "__main__":
    run_command(main, version=written_by())
