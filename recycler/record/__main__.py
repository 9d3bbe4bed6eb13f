"""Command: record traces of default prompts or of the user's own texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from policies import GroupPooling, Ranking, Selection, written_by
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import max_positions
from recycler.prompts import KINDS, TURNING_KINDS, Prompt, default_prompts, prompts_from_files
from recycler.record.folder import find_recorded, record_prompts
from recycler.record.written_continuation import with_written_continuation
from traces.reporting.command import run_command

_UNPOOLED = Selection.unpooled(128)


def main(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="More texts, so that --prompts *.txt takes them all.", metavar="FILE"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the traces.")] = Path("traces-out"),
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or local folder; the embedded default when not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the model.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device; cuda where there is one, else cpu.")] = None,
    context_tokens: Annotated[int, typer.Option(help="Tokens of each default prompt.")] = 1536,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each trace.")] = 96,
    max_age: Annotated[
        int | None, typer.Option(min=1, help="Oldest set to record, in steps; as many as --steps when not given.")
    ] = None,
    per_kind: Annotated[int, typer.Option(min=1, help="Default prompts of each kind.")] = 4,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Kinds of default prompts: some of {', '.join(KINDS)} (all of these by default), or of those whose "
            f"output turns: {', '.join(TURNING_KINDS)}."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn in default prompts.")] = 0,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Text files instead of default prompts; their end is the continuation."),
    ] = None,
    write_continuation: Annotated[
        bool, typer.Option("--write-continuation", help="Let the model continue the text files, and record that.")
    ] = False,
    k: Annotated[int, typer.Option(help="Most tokens of a recycled set.")] = _UNPOOLED.k,
    sinks: Annotated[int, typer.Option(help="First tokens, always kept.")] = Selection.sinks,
    window: Annotated[int, typer.Option(help="Last tokens, always kept.")] = Selection.window,
    pool_backward: Annotated[
        int, typer.Option(help="Tokens before an attended one that come along.")
    ] = Selection.pool_backward,
    pool_forward: Annotated[
        int, typer.Option(help="Tokens after an attended one that come along.")
    ] = _UNPOOLED.pool_forward,
    group: Annotated[GroupPooling, typer.Option(help="How query heads of a group are pooled.")] = Selection.group,
    ranking: Annotated[Ranking, typer.Option(help="What decides which token leaves a full set.")] = _UNPOOLED.ranking,
    score_decay: Annotated[
        float, typer.Option(help="What is left of a score after a step, with ranking decayed.")
    ] = Selection.score_decay,
    prompt_queries: Annotated[
        int, typer.Option(help="Last queries of the prompt that choose the first set.")
    ] = _UNPOOLED.prompt_queries or 1,
    memory_mib: Annotated[int, typer.Option(min=1, help="Most memory beside the model, in MiB.")] = 1024,
) -> dict[str, Any]:
    """Record what every schedule would meet: one trace per prompt, prompts recorded already left as they are."""
    selection = Selection(
        k, sinks, window, pool_backward, pool_forward, group, ranking, prompt_queries, score_decay=score_decay
    )
    max_age = steps if max_age is None else max_age
    texts = [*(prompts or []), *(files or [])]
    if texts and kinds:
        raise ValueError("--kinds chooses among default prompts: leave it out where text files are given.")
    if write_continuation and not texts:
        raise ValueError("--write-continuation continues text files: name them with --prompts.")

    loaded = load_model(model, dtype=dtype, device=device)
    if not texts:
        chosen = default_prompts(
            loaded.tokenizer,
            n_per_kind=per_kind,
            context_tokens=context_tokens,
            n_steps=steps,
            seed=seed,
            kinds=_split(kinds),
        )
    else:
        chosen = _from_files(loaded, texts, steps, write_continuation)

    before = find_recorded(loaded, chosen, selection, out, max_age=max_age)
    n_tokens = sum(len(prompt.tokens) for prompt in chosen if prompt.name not in before)
    begin = time.perf_counter()
    record_prompts(loaded, chosen, selection, out, max_age=max_age, memory_mib=memory_mib)
    seconds = time.perf_counter() - begin
    return {
        "traces": str(out),
        "recorded": len(chosen) - len(before),
        "skipped": len(before),
        "steps": steps,
        "max_age": max_age,
        "k": k,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(n_tokens / seconds, 1) if n_tokens else None,
    }


def _split(names: Sequence[str] | None) -> list[str] | None:
    """`a,b` counts as `a` and `b`."""
    return [part.strip() for name in names for part in name.split(",")] if names else None


def _from_files(loaded: LoadedModel, files: Sequence[Path], steps: int, write_continuation: bool) -> list[Prompt]:
    most = max_positions(loaded.model)
    if not write_continuation:
        return prompts_from_files(files, loaded.tokenizer, steps, most)
    # All of a text goes into its prompt: the one step asked for here is the text's own last token.
    return with_written_continuation(loaded, prompts_from_files(files, loaded.tokenizer, 1, most), steps)


if __name__ == "__main__":
    run_command(main, version=written_by())
